"""What the kernel says about losing the core: positive evidence that a worker was descheduled (Linux).

Two sources. A thread's wait in the run queue (woken or preempted, and not yet running) stands in
/proc/<pid>/task/<tid>/schedstat in nanoseconds. What the hypervisor gave to somebody else stands in /proc/stat as
`steal` of each core, in steps of 10 ms.
Where the kernel keeps neither, there is no evidence, and the ledger leaves the time unattributed.
"""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from evener.units import Nanoseconds

_STEAL = 8
"""Column of /proc/stat."""
_IDLE_LIBRARIES = ("ZMQ",)
"""Threads that compute nothing for the model, by the beginning of their names."""


class Helpers(NamedTuple):
    """Of the threads that compute beside the calling one."""

    cpu: Nanoseconds
    """CPU time of all of them since they were first seen."""
    delay: tuple[int, ...]
    """Each one's wait in the run queue, nanoseconds; a thread keeps its place."""


class KernelTime:
    """Reads the counters of the calling thread, which must be the one that reads them later."""

    def __init__(self, cores: Iterable[int], threads: int) -> None:
        """`cores`: where the device's threads run. `threads`: of the device, the caller included."""
        self._own = _open(Path("/proc/thread-self/schedstat"))
        self._stat = _open(Path("/proc/stat"))
        self._rows = {f"cpu{core}".encode() for core in cores}
        self._tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        self._threads = threads
        self._helpers: dict[str, int] = {}
        self._steal_used = 0
        self._steal_since = self._steal()
        self.look_for_helpers()

    def delay(self) -> int:
        """How long the calling thread has waited in the run queue since it began, nanoseconds."""
        return _schedstat(self._own)[1] if self._own is not None else 0

    def look_for_helpers(self) -> None:
        """Find threads that were started meanwhile; libraries start theirs at the first use."""
        if self._threads == 1:
            return
        own = Path("/proc/thread-self").readlink().name
        for task in Path("/proc/self/task").iterdir():
            if task.name == own or task.name in self._helpers:
                continue
            with suppress(OSError):  # it may end meanwhile
                if not (task / "comm").read_text().startswith(_IDLE_LIBRARIES):
                    fd = _open(task / "schedstat")
                    if fd is not None:
                        self._helpers[task.name] = fd

    def helpers(self) -> Helpers:
        """What the other threads of the device report so far."""
        read = [_schedstat(fd) for fd in self._helpers.values()]
        return Helpers(Nanoseconds(sum(cpu for cpu, _ in read)), tuple(delay for _, delay in read))

    def take_stolen(self, most: int) -> int:
        """Claim up to `most` nanoseconds of what the hypervisor took from these cores and nobody has claimed yet.

        The kernel counts in ticks, so one tick may be claimed before it shows.
        """
        if most <= 0 or (stolen := self._steal()) == 0:
            return 0
        taken = max(0, min(most, stolen - self._steal_since + self._tick - self._steal_used))
        self._steal_used += taken
        return taken

    def forget_stolen(self) -> None:
        """Drop what nobody claimed: steal explains only its own time."""
        over = self._steal() - self._steal_since - self._steal_used
        self._steal_used += max(0, over)

    def _steal(self) -> int:
        """Of the core that lost most, since the machine began: the others of a device wait for that one."""
        if self._stat is None:
            return 0
        most = 0
        for line in os.pread(self._stat, 1 << 16, 0).splitlines():
            fields = line.split(maxsplit=_STEAL + 1)
            if fields[0] in self._rows and len(fields) > _STEAL:
                most = max(most, int(fields[_STEAL]))
            elif not fields[0].startswith(b"cpu"):
                break
        return most * self._tick


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None


def _schedstat(fd: int) -> tuple[int, int]:
    """(CPU time, run-queue wait) of a thread, nanoseconds; zeros once it has ended."""
    try:
        cpu, delay, _ = os.pread(fd, 64, 0).split()
    except (OSError, ValueError):
        return 0, 0
    return int(cpu), int(delay)
