"""Shared-memory collectives and pipes for ranks on one host (Linux: memfd and futex).

The host creates a `Segment` for one replica and epoch and starts each worker with its descriptor; the workers attach
and open their groups and pipes in it. The segment has no name in the file system: it is gone when the last process
that maps it is, whatever ended it.

    layout = SegmentLayout.plan([GroupSpec(("cpu:0", "cpu:1"))], [PipeSpec("cpu:1", "cpu:2")])
    segment = Segment.create(layout)
    subprocess.Popen(worker, pass_fds=[segment.fd])                 # host
    segment.abort("cpu:1", "exited with signal 9")                  # host, when a worker is lost

    group = ShmGroup(Segment.attach(fd), layout.groups[0], rank=0)  # worker

A lost worker ends the segment: every wait in it, present and to come, raises WorkerLost, and so does one whose deadline
passes (which aborts the segment for the others). The next epoch has a fresh segment.

One thread at a time may use a group or one end of a pipe. Waits spin briefly, then sleep; they give the interpreter
lock up to sleep, or at once for tensors over 64 KiB. Signal handlers run, and may raise, while a wait sleeps.
"""

import sys
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING

if sys.platform != "linux":
    raise ImportError(
        f"the shared-memory transport needs Linux (memfd, futex), this is {sys.platform}; use transport.torchdist"
    )

import torch

from evener.errors import WorkerLost
from evener.execute.live.transport import _shm
from evener.execute.live.transport.base import Stamp
from evener.execute.live.transport.layout import DIRECT_BYTES, GroupRegion, PipeRegion, link_time
from evener.execute.live.transport.pace import Pace
from evener.execute.live.transport.segment import Segment
from evener.kernels.layers import Batch, Layers
from evener.units import NS_PER_S, Nanoseconds, Seconds, ns

if TYPE_CHECKING:
    from collections.abc import Iterator

DEADLINE = Seconds(60.0)
SPIN = Seconds(100e-6)
"""Longest spin before a sleep; twice what falling asleep and being woken costs. Shorter while waits last longer, none
while a missing peer was last seen on this rank's own core. Pass 0 to ranks that share cores with other replicas."""

_SUMMABLE = {torch.float32: 0, torch.bfloat16: 1}


class ShmGroup:
    """`base.Group` in a segment. CPU tensors; sums of fp32 and bf16 (added in fp32, rounded once).

    The sum is taken in rank order by every rank for small tensors, by one rank for each share of large ones: always the
    same bits everywhere. With a declared link an operation ends no earlier than `link_time` after the last arrival.
    """

    def __init__(
        self, segment: Segment, region: GroupRegion, rank: int, deadline: Seconds = DEADLINE, spin: Seconds = SPIN,
        pace: Pace | None = None,
    ) -> None:  # fmt: skip
        """`pace`: of the device, paid before operations."""
        self.rank = rank
        self.size = len(region.spec.devices)
        self._spec = region.spec
        self._deadline = deadline
        self._segment = Segment(segment.native.share())  # to abort it, also when the caller has closed its own
        self._linked = region.spec.delay > 0 or region.spec.bandwidth is not None
        self._native: _shm.Group | None = _shm.Group(
            segment.native, region.offset, region.first_bell, rank, self.size, region.spec.slot_bytes,
            DIRECT_BYTES, ns(deadline), ns(spin), pace,
        )  # fmt: skip

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        """See `base.Group`. fp32 or bf16."""
        dtype = _SUMMABLE.get(t.dtype)
        if dtype is None:
            raise ValueError(f"all_reduce of {t.dtype}; shared memory sums float32 and bfloat16")
        _check(t)
        if self.size == 1:
            return _alone()
        floor = self._floor("all_reduce", t.nbytes) if self._linked else 0
        with self._peers() as native:
            return Stamp(*native.all_reduce(t.data_ptr(), t.numel(), dtype, floor))

    def run_layers(self, layers: Layers, batch: Batch, x_TH: torch.Tensor) -> list[Stamp]:
        """Run a shard's layers on a batch, fp32, with the all_reduce after each half: the same as one by one.

        Returns the stamps of the sums, in order. Raises as `all_reduce` does.
        """
        if self.size == 1:
            layers.run(batch, x_TH)
            return []
        floor = self._floor("all_reduce", x_TH.nbytes) if self._linked else 0
        with self._peers() as native:
            stamps = layers.run_with_peers(batch, x_TH, _shm.SUM, native.address, floor)
            if stamps is None:
                native.rethrow()
                raise AssertionError("a sum failed without a reason")
        return [Stamp._make(s) for s in stamps.tolist()]

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See `base.Group`."""
        _check(t)
        _check(out)
        if out.dtype != t.dtype or out.shape != (self.size, *t.shape):
            raise ValueError(f"all_gather of {_shape(t)} over {self.size} ranks into {_shape(out)}")
        if self.size == 1:
            out.copy_(t.unsqueeze(0))
            return _alone()
        floor = self._floor("all_gather", t.nbytes) if self._linked else 0
        with self._peers() as native:
            return Stamp(*native.all_gather(t.data_ptr(), out.data_ptr(), t.nbytes, floor))

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See `base.Group`."""
        _check(t)
        _check(out)
        if out.dtype != t.dtype or out.shape != t.shape or t.dim() == 0 or t.shape[0] != self.size:
            raise ValueError(f"all_to_all of {_shape(t)} into {_shape(out)}; both must be [{self.size}, ...]")
        if self.size == 1:
            out.copy_(t)
            return _alone()
        floor = self._floor("all_to_all", t.nbytes) if self._linked else 0
        with self._peers() as native:
            return Stamp(*native.all_to_all(t.data_ptr(), out.data_ptr(), t.nbytes // self.size, floor))

    def close(self) -> None:
        """See `base.Group`. Peers are not told; abort the segment to stop them."""
        self._native = None
        self._segment.close()

    def _floor(self, op: str, nbytes: int) -> int:
        return link_time(op, nbytes, self.size, self._spec.delay, self._spec.bandwidth)

    @contextmanager
    def _peers(self) -> "Iterator[_shm.Group]":
        """Turns what ends a wait into WorkerLost."""
        native = self._native
        if native is None:
            raise ValueError("the group is closed")
        try:
            yield native
        except _shm.Aborted as e:
            raise WorkerLost(*e.args) from None
        except _shm.Late as e:
            late = [r for r in range(self.size) if e.args[0] >> r & 1]
            ranks = ("rank " if len(late) == 1 else "ranks ") + ", ".join(map(str, late))
            reason = (
                f"{ranks} had not arrived at collective {native.operations} of rank {self.rank} "
                f"({self._spec.devices[self.rank]}) within {self._deadline:.3g} s, its deadline"
            )
            raise _lost(self._segment, ", ".join(self._spec.devices[r] for r in late), reason) from None
        except _shm.Mismatch as e:
            raise RuntimeError(f"ranks of a group called different collectives: {e}") from None


class ShmPipe:
    """`base.Pipe` in a segment: one end of it. CPU tensors of any dtype.

    Stamps: a receiver's `arrived` is the later of both entries. A sender does not wait for its receiver unless the
    ring is full; then `arrived` is the entry of the receive that made room, otherwise it is `entered`. With a declared
    link a message is due at its entry plus its bytes over the bandwidth (one after another) plus the delay.
    """

    def __init__(
        self, segment: Segment, region: PipeRegion, role: str, deadline: Seconds = DEADLINE, spin: Seconds = SPIN,
        pace: Pace | None = None,
    ) -> None:  # fmt: skip
        """`role`: "send" or "recv". `pace`: of the device, paid before operations."""
        if role not in ("send", "recv"):
            raise ValueError(f"pipe role {role!r}; it is send or recv")
        spec = region.spec
        self.role = role
        self._deadline = deadline
        self._segment = Segment(segment.native.share())  # to abort it, also when the caller has closed its own
        self._peer = spec.receiver if role == "send" else spec.sender
        self._native: _shm.Pipe | None = _shm.Pipe(
            segment.native, region.offset, region.first_bell, role == "send", spec.capacity, ns(deadline), ns(spin),
            ns(spec.delay), NS_PER_S / spec.bandwidth if spec.bandwidth else 0.0, pace,
        )  # fmt: skip

    def send(self, t: torch.Tensor) -> Stamp:
        """See `base.Pipe`."""
        _check(t)
        with self._peers("send") as native:
            return Stamp(*native.send(t.data_ptr(), t.nbytes))

    def recv(self, out: torch.Tensor) -> Stamp:
        """See `base.Pipe`. Raises ValueError when the next message has another size; it then stays in the pipe."""
        _check(out)
        with self._peers("recv") as native:
            return Stamp(*native.recv(out.data_ptr(), out.nbytes))

    def poll(self) -> bool:
        """Whether `recv` would find a message now (its beginning, if it is longer than the ring). Raises WorkerLost."""
        with self._peers("recv") as native:
            return native.poll()

    def try_recv(self, out: torch.Tensor) -> Stamp | None:
        """`recv` if a message is there, else None. Raises WorkerLost."""
        return self.recv(out) if self.poll() else None

    def close(self) -> None:
        """See `base.Pipe`. The peer is not told; abort the segment to stop it."""
        self._native = None
        self._segment.close()

    @contextmanager
    def _peers(self, role: str) -> "Iterator[_shm.Pipe]":
        """Turns what ends a wait into WorkerLost."""
        native = self._native
        if native is None:
            raise ValueError("the pipe is closed")
        if role != self.role:
            raise ValueError(f"this end of the pipe can {self.role}, not {role}")
        try:
            yield native
        except _shm.Aborted as e:
            raise WorkerLost(*e.args) from None
        except _shm.Late:
            what = "received nothing from a full pipe" if role == "send" else "sent nothing into an empty pipe"
            reason = f"it {what} for {self._deadline:.3g} s, the deadline"
            raise _lost(self._segment, self._peer, reason) from None
        except _shm.Mismatch as e:
            raise ValueError(str(e)) from None


def _lost(segment: Segment, device: str, reason: str) -> WorkerLost:
    """Abort for everybody; whoever aborted first names the cause."""
    segment.abort(device, reason)
    return segment.lost or WorkerLost(device, reason)


def _alone() -> Stamp:
    now, cpu = Nanoseconds(time.monotonic_ns()), Nanoseconds(time.thread_time_ns())
    return Stamp(now, now, now, cpu, cpu)


def _check(t: torch.Tensor) -> None:
    if not t.is_cpu:
        raise ValueError(f"a tensor on {t.device} cannot go through shared memory; use transport.torchdist")
    if not t.is_contiguous():
        raise ValueError(f"tensor {_shape(t)} is not contiguous; pass t.contiguous()")


def _shape(t: torch.Tensor) -> str:
    return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
