"""Regions do not overlap; the price of a declared link is what it says."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import names

from evener.execute.live.transport import _shm
from evener.execute.live.transport.layout import DIRECT_BYTES, GroupSpec, PipeSpec, SegmentLayout, link_time
from evener.units import Bytes, Seconds

GROUPS = st.builds(
    GroupSpec, st.integers(1, 9).map(names), st.sampled_from([4096, 65536, 1 << 20]), st.sampled_from([0.0, 1e-3])
)
PIPES = st.builds(PipeSpec, st.just("a"), st.just("b"), st.integers(64, 5000).map(lambda n: 64 * n))


@settings(max_examples=60, deadline=None)
@given(groups=st.lists(GROUPS, max_size=4), pipes=st.lists(PIPES, max_size=4))
def test_regions_and_bells_are_disjoint_and_inside(groups: list[GroupSpec], pipes: list[PipeSpec]) -> None:
    layout = SegmentLayout.plan(groups, pipes)
    places = [
        (g.offset, _shm.group_bytes(len(g.spec.devices), g.spec.slot_bytes), g.first_bell, len(g.spec.devices))
        for g in layout.groups
    ] + [(p.offset, _shm.pipe_bytes(p.spec.capacity), p.first_bell, 2) for p in layout.pipes]
    at, bell = _shm.PAGE + layout.bells * _shm.BELL, 0
    for offset, nbytes, first_bell, bells in places:
        assert offset >= at and offset % _shm.PAGE == 0 and first_bell == bell
        at, bell = offset + nbytes, bell + bells
    assert at <= layout.size or not places
    assert bell == layout.bells
    assert [g.spec for g in layout.groups] == groups and [p.spec for p in layout.pipes] == pipes
    assert msgspec.json.decode(msgspec.json.encode(layout), type=SegmentLayout) == layout


def test_link_time_counts_received_bytes_and_exchanges() -> None:
    assert link_time("all_gather", 1000, 4, 0.0, 1e6) == 3_000_000
    assert link_time("all_to_all", 1000, 4, 0.001, 1e6) == 1_750_000
    assert link_time("all_reduce", 1000, 4, 0.001, None) == 1_000_000
    assert link_time("all_reduce", 2 * DIRECT_BYTES, 2, 0.001, None) == 1_000_000
    assert link_time("all_reduce", 2 * DIRECT_BYTES, 4, 0.001, 2 * DIRECT_BYTES) == 2_000_000 + 1_500_000_000
    assert link_time("all_reduce", 1000, 1, 0.001, 1.0) == 0
    with pytest.raises(ValueError, match="no collective"):
        link_time("broadcast", 1, 2, 0.0, None)


@pytest.mark.parametrize(
    ("group", "message"),
    [
        (GroupSpec(()), "no devices"),
        (GroupSpec(names(2), slot_bytes=Bytes(100)), "multiple of 4096"),
        (GroupSpec(names(2), delay=Seconds(-1.0)), "delay=-1"),
        (GroupSpec(names(2), bandwidth=0.0), "bandwidth=0"),
    ],
)
def test_a_spec_that_cannot_work_is_refused(group: GroupSpec, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SegmentLayout.plan([group])
    with pytest.raises(ValueError, match="multiple of 64"):
        SegmentLayout.plan([], [PipeSpec("a", "b", Bytes(4100))])
