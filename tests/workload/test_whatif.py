"""Another plan in place of the one that ran: which limits the same server would set it."""

import pytest
from msgspec import structs
from tests.workload.recordings import MODEL, header

from evener.errors import InvalidPlan
from evener.plan.capacity import default_chunk
from evener.plan.default import equal_plan
from evener.spec.memory import MemoryConfig, block_bytes
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.workload.replay import recorded_costs
from evener.workload.whatif import with_plan

TWO = ("cpu:0", "cpu:1")


def plan(run_devices: int, tp: int, dp: int) -> Plan:
    written, _ = header(TWO, 2, 1, 1)
    return equal_plan(MODEL, written.cluster.devices[:run_devices], tp, 1, dp)


def test_the_same_plan_keeps_its_limits() -> None:
    written, _ = header(TWO, 2, 1, 1, kv_blocks=40)
    assert with_plan(written, written.plan) == written


def test_each_device_has_the_room_for_kv_that_it_had() -> None:
    """Whole copies hold all heads of a block: fewer blocks in the same bytes; and more, the other way."""
    written, _ = header(TWO, 2, 1, 1, kv_blocks=40)
    memory = MemoryConfig(dtype="fp32", kv_dtype="fp32")
    stage = written.plan.replicas[0].stages[0]
    room = 40 * max(block_bytes(shard, stage, MODEL, memory) for shard in stage.shards)
    copies = with_plan(written, plan(2, 1, 2))
    whole = copies.plan.replicas[0].stages[0]
    assert copies.kv_blocks == [room // block_bytes(whole.shards[0], whole, MODEL, memory)] * 2
    assert with_plan(copies, written.plan).kv_blocks[0] >= 40 - 1


def test_a_chunk_that_nobody_chose_is_chosen_again() -> None:
    written, costs = header(TWO, 2, 1, 1)
    given = written.brain.max_num_batched_tokens
    assert with_plan(written, plan(2, 1, 2)).brain.max_num_batched_tokens == given
    default = default_chunk(lambda shape: costs.batch_ns(0, shape))
    assert default != given
    unsaid = structs.replace(written, brain=structs.replace(written.brain, max_num_batched_tokens=default))
    other = with_plan(unsaid, plan(2, 1, 2))
    assert other.brain.max_num_batched_tokens == default_chunk(lambda s: recorded_costs(other).batch_ns(0, s))


def test_what_cannot_be() -> None:
    written, _ = header(TWO, 2, 1, 1, kv_blocks=1)
    with pytest.raises(InvalidPlan, match="holds no block of replica 0"):
        with_plan(written, plan(1, 1, 1))
    elsewhere = Plan((Replica((Stage((0, 6), (Shard("cpu:9", (0, 6), (0, 192), (0, 600), (0, 600)),)),)),), name="far")
    with pytest.raises(InvalidPlan, match="far uses cpu:9, the run used cpu:0, cpu:1"):
        with_plan(written, elsewhere)
    hole = Plan((Replica((Stage((0, 5), (Shard("cpu:0", (0, 6), (0, 192), (0, 600), (0, 600)),)),)),))
    with pytest.raises(InvalidPlan, match="layers"):
        with_plan(written, hole)
