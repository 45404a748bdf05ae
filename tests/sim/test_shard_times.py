"""How the time of a stage divides on its shards: the contract between cost models and the simulator."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.cost.base import BatchShape, stepwise_run
from evener.cost.rates import default_profile
from evener.cost.roofline import RooflineCostModel
from evener.cost.stage import MAX_ROWS
from evener.plan.default import equal_plan
from evener.spec.cluster import Device, Link, parse_device
from evener.spec.model import ModelSpec
from evener.units import Seconds

MODEL = ModelSpec("llama", vocab=320, hidden=64, layers=6, heads=9, kv_heads=3, head_dim=8, ffn=192, max_position=4096)


def costs(names: str, tp: int, pp: int) -> tuple[RooflineCostModel, list[Device]]:
    devices = [parse_device(name) for name in names.split()]
    links = (Link(devices[0].name, devices[-1].name, Seconds(1e-4), 1e8),)
    plan = equal_plan(MODEL, devices, tp, pp, 1)
    return RooflineCostModel(MODEL, plan, default_profile(devices), links=links), devices


LAYOUTS = [
    costs("cpu:0", 1, 1), costs("cpu:0 cpu:1", 2, 1), costs("cpu:0 cpu:1,slowdown=3", 2, 1),
    costs("cpu:0 cpu:0#1 cpu:1", 3, 1), costs("cpu:0 cpu:1 cpu:0#1 cpu:1#1", 2, 2), costs("cpu:0 cpu:1", 1, 2),
    costs("cpu:0 cpu:0#1,slowdown=4", 2, 1), costs("cpu:0,slowdown=1.5 cpu:0#1 cpu:1,slowdown=3", 1, 3),
]  # fmt: skip
SHAPES = st.builds(
    BatchShape, st.integers(0, 3 * MAX_ROWS), st.integers(0, 10**7), st.integers(0, 300), st.integers(0, 10**6),
    st.integers(0, 2 * MAX_ROWS), st.integers(0, 200), st.integers(0, 9),
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(SHAPES, st.sampled_from(LAYOUTS))
def test_parts_sum_to_the_stage(shape: BatchShape, layout: tuple[RooflineCostModel, list[Device]]) -> None:
    """Every shard's parts sum to the time of the stage, to the nanosecond, and none is negative."""
    model, _ = layout
    for stage, tables in enumerate(model._replicas[0]):
        shards = model.shards_ns(0, stage, shape)
        assert len(shards) == len(tables.own)
        for shard in shards:
            assert min(shard) >= 0 and sum(shard) == model.stage_ns(0, stage, shape)


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 300), st.integers(0, 10**6), st.integers(1, 40), st.sampled_from(LAYOUTS))
def test_a_run_of_steps_is_its_steps(
    rows: int, context: int, steps: int, layout: tuple[RooflineCostModel, list[Device]]
) -> None:
    """All at once or one by one: the same nanoseconds on every shard."""
    model, _ = layout
    for stage in range(len(model._replicas[0])):
        fast = model.decode_run(0, stage, rows, context, steps)
        slow = stepwise_run(model, 0, stage, rows, context, steps)
        assert fast.host == slow.host
        assert (fast.busy == slow.busy).all() and (fast.shards == slow.shards).all()


def test_a_slower_rank_is_waited_for() -> None:
    """A declared slow-down of 3 on one of two equal ranks: the other waits about two thirds of the time."""
    model, _ = LAYOUTS[2]
    fast, slow = model.shards_ns(0, 0, BatchShape(decode_rows=64, decode_context=64_000, sampled_rows=64))
    assert slow.straggler < 0.2 * slow.compute and fast.straggler > 1.5 * fast.compute


def test_sharing_a_core_is_contention() -> None:
    """Two workers on one core compute half of the time that it takes, and wait for the core in the other half."""
    model, _ = LAYOUTS[3]
    one, other, alone = model.shards_ns(0, 0, BatchShape(decode_rows=8, decode_context=800, sampled_rows=8))
    assert one.contended == pytest.approx(one.compute, abs=1) and other.contended == pytest.approx(other.compute, abs=1)
    assert alone.contended == 0 and alone.straggler > 0
