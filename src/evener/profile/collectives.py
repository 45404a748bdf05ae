"""The shared-memory groups that probes measure collectives in. The transport is loaded lazily: it is native."""

from typing import TYPE_CHECKING

from evener.units import Seconds

if TYPE_CHECKING:
    from evener.execute.live.transport import _shm
    from evener.execute.live.transport.layout import SegmentLayout
    from evener.execute.live.transport.shm import ShmGroup

DEADLINE = Seconds(20.0)


def _layout(sizes: tuple[int, ...]) -> "SegmentLayout":
    from evener.execute.live.transport.layout import GroupSpec, SegmentLayout

    return SegmentLayout.plan([GroupSpec(tuple(f"rank {r}" for r in range(n))) for n in sizes])


def create(sizes: tuple[int, ...]) -> "_shm.Segment":
    """A segment with one group per entry of `sizes`. No torch. Raises ImportError where the transport is missing."""
    from evener.execute.live.transport import _shm

    layout = _layout(sizes)
    return _shm.Segment.create(layout.size, layout.bells)


def join(fd: int, sizes: tuple[int, ...], rank: int) -> "dict[int, ShmGroup]":
    """Open every group that has this rank. Takes `fd` over."""
    from evener.execute.live.transport.segment import Segment
    from evener.execute.live.transport.shm import ShmGroup

    segment, layout = Segment.attach(fd), _layout(sizes)
    return {g: ShmGroup(segment, layout.groups[g], rank, deadline=DEADLINE) for g, n in enumerate(sizes) if rank < n}
