"""Memory that the processes of one replica share. No torch: the control process makes it, and computes nothing."""

import os
import sys

if sys.platform != "linux":
    raise ImportError(
        f"the shared-memory transport needs Linux (memfd, futex), this is {sys.platform}; use transport.torchdist"
    )

from evener.errors import WorkerLost
from evener.execute.live.transport import _shm
from evener.execute.live.transport.layout import SegmentLayout


class Segment:
    """Memory shared by the processes of one replica in one epoch."""

    def __init__(self, native: _shm.Segment) -> None:
        self.native = native

    @classmethod
    def create(cls, layout: SegmentLayout) -> "Segment":
        """A zeroed segment for `layout`, open in this process only. Raises OSError."""
        return cls(_shm.Segment.create(layout.size, layout.bells))

    @classmethod
    def attach(cls, fd: int) -> "Segment":
        """Map a segment another process created. Takes `fd` over and closes it.

        Raises OSError, or ValueError when `fd` is something else; `fd` then stays open.
        """
        return cls(_shm.Segment.attach(fd))

    @property
    def fd(self) -> int:
        """Descriptor to hand to a worker (`pass_fds`); -1 once closed, and in a process that attached."""
        return self.native.fd

    @property
    def path(self) -> str:
        """What another process of this user can open (O_RDWR) and attach, as long as this segment is not closed."""
        return f"/proc/{os.getpid()}/fd/{self.fd}"

    @property
    def lost(self) -> WorkerLost | None:
        """Why the segment was aborted; None while it is not."""
        found = self.native.aborted()
        return WorkerLost(*found) if found else None

    def abort(self, device: str, reason: str) -> bool:
        """Make every present and future wait raise WorkerLost(device, reason), at once.

        The first abort wins: True when it was this one; False too when this segment is closed. Names longer than 127
        bytes and reasons longer than 639 are cut.
        """
        return self.native.abort(device, reason)

    def close(self) -> None:
        """Close the descriptor. The mapping goes with the last group or pipe opened on it. Idempotent."""
        self.native.close()
