"""Where each group and pipe of a replica lies in its one shared segment, and what a declared link costs.

The host computes the layout once per epoch and sends it to every worker; it is plain data.
"""

from collections.abc import Sequence

from msgspec import Struct

from evener.execute.live.transport._shm import BELL, PAGE, group_bytes, pipe_bytes
from evener.units import NS_PER_S, Bytes, Nanoseconds, Seconds

DIRECT_BYTES = Bytes(64 << 10)
"""An all-reduce up to this size, or of two ranks, is one exchange; a larger one is scattered and gathered."""


class GroupSpec(Struct, frozen=True):
    """The ranks of one stage, in rank order, by device name."""

    devices: tuple[str, ...]
    slot_bytes: Bytes = Bytes(256 << 10)
    """Of each rank's tensor in one step; a larger tensor takes several. A multiple of 4096. This size stays in a core's
    second-level cache; with more ranks than cores, 1 MiB makes large tensors meet less often. The group takes
    2 * (ranks + 1) * slot_bytes of memory."""
    delay: Seconds = Seconds(0.0)
    """Declared, one way. The group's ranks must declare the same: the worst link among them."""
    bandwidth: float | None = None
    """Declared, bytes/s into each rank; None: as fast as memory."""


class PipeSpec(Struct, frozen=True):
    """A one-way channel between two devices."""

    sender: str
    receiver: str
    capacity: Bytes = Bytes(1 << 20)
    """Of the ring, headers (64 bytes a message) included; a multiple of 64, at least 4096. Longer messages stream."""
    delay: Seconds = Seconds(0.0)
    bandwidth: float | None = None


class GroupRegion(Struct, frozen=True):
    """A group and its place."""

    spec: GroupSpec
    offset: int
    first_bell: int


class PipeRegion(Struct, frozen=True):
    """A pipe and its place."""

    spec: PipeSpec
    offset: int
    first_bell: int


class SegmentLayout(Struct, frozen=True):
    """All groups and pipes of one segment, in the order they were asked for."""

    size: int
    bells: int
    """Words to sleep on: one per rank of a group, two per pipe."""
    groups: tuple[GroupRegion, ...]
    pipes: tuple[PipeRegion, ...]

    @staticmethod
    def plan(groups: Sequence[GroupSpec], pipes: Sequence[PipeSpec] = ()) -> "SegmentLayout":
        """Place regions one after another, page-aligned. Raises ValueError for a spec that cannot work."""
        for g in groups:
            _check_link(g.delay, g.bandwidth)
            if not g.devices:
                raise ValueError("a group has no devices; name one per rank")
            if g.slot_bytes < PAGE or g.slot_bytes % PAGE:
                raise ValueError(f"slot_bytes={g.slot_bytes}; give a positive multiple of {PAGE}")
        for p in pipes:
            _check_link(p.delay, p.bandwidth)
            if p.capacity < PAGE or p.capacity % 64:
                raise ValueError(f"pipe capacity={p.capacity}; give a multiple of 64, at least {PAGE}")
        bells = sum(len(g.devices) for g in groups) + 2 * len(pipes)
        at, bell = PAGE + -(-bells * BELL // PAGE) * PAGE, 0
        placed_groups, placed_pipes = [], []
        for g in groups:
            placed_groups.append(GroupRegion(g, at, bell))
            at += group_bytes(len(g.devices), g.slot_bytes)
            bell += len(g.devices)
        for p in pipes:
            placed_pipes.append(PipeRegion(p, at, bell))
            at += pipe_bytes(p.capacity)
            bell += 2
        return SegmentLayout(at, bells, tuple(placed_groups), tuple(placed_pipes))


def _check_link(delay: float, bandwidth: float | None) -> None:
    if not 0 <= delay < float("inf"):
        raise ValueError(f"link delay={delay} s; give a number of seconds, 0 or more")
    if bandwidth is not None and not 0 < bandwidth < float("inf"):
        raise ValueError(f"link bandwidth={bandwidth} bytes/s; give a positive number, or None for no limit")


def link_time(op: str, nbytes: int, ranks: int, delay: float, bandwidth: float | None) -> Nanoseconds:
    """Least time from the last arrival to the end of a collective over a declared link.

    `nbytes` is each rank's input. The delay is paid once per exchange, the bandwidth for the bytes that one rank
    receives: `all_gather` (ranks - 1) * n; `all_to_all` (ranks - 1) / ranks * n; `all_reduce` the same as gathering
    when it is one exchange (two ranks, or at most DIRECT_BYTES), else two exchanges of (ranks - 1) / ranks * n.
    """
    if ranks < 2:
        return Nanoseconds(0)
    share = (ranks - 1) / ranks * nbytes
    if op == "all_to_all":
        rounds, received = 1, share
    elif op == "all_gather" or (op == "all_reduce" and (ranks == 2 or nbytes <= DIRECT_BYTES)):
        rounds, received = 1, float((ranks - 1) * nbytes)
    elif op == "all_reduce":
        rounds, received = 2, 2 * share
    else:
        raise ValueError(f"{op!r} is no collective; the collectives are all_reduce, all_gather, all_to_all")
    transfer = received / bandwidth if bandwidth else 0.0
    return Nanoseconds(round((rounds * delay + transfer) * NS_PER_S))
