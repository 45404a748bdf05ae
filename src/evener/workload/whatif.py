"""What another plan would have done in place of the one that served: its limits, as the same server would set them."""

from msgspec import structs

from evener.cost.base import CostModel
from evener.errors import InvalidPlan
from evener.execute.served import Header
from evener.plan.capacity import default_chunk
from evener.spec.memory import MemoryConfig, block_bytes, kv_blocks
from evener.spec.plan import Plan, validate
from evener.units import Bytes
from evener.workload.replay import recorded_costs


def with_plan(header: Header, plan: Plan) -> Header:
    """The same run with another plan, on the devices of the run, each with as much room for KV as it had.

    Raises InvalidPlan for one that cannot work, or names other devices.
    """
    known = [d.name for d in header.cluster.devices]
    for name in plan.devices():
        if name not in known:
            raise InvalidPlan(
                f"plan {plan.name} uses {name}, the run used {', '.join(known)}, and only of these is it known how "
                "fast they were; name these"
            )
    validate(plan, header.model, header.cluster)
    other = structs.replace(header, plan=plan)
    brain = header.brain
    if brain.max_num_batched_tokens == _chunk(header):  # nobody said otherwise
        brain = structs.replace(brain, max_num_batched_tokens=_chunk(other))
    memory = _memory(header, brain.max_num_batched_tokens)
    room = _kv_room(header, memory)
    most = brain.max_num_seqs * -(-header.model.max_position // memory.block_tokens)
    blocks = [min(most, kv_blocks(r, header.model, header.cluster, memory, room)) for r in plan.replicas]
    for r, count in enumerate(blocks):
        if count < 1:
            raise InvalidPlan(
                f"plan {plan.name}: the room for KV of the run holds no block of replica {r}; use more stages"
            )
    return structs.replace(other, brain=brain, kv_blocks=blocks)


def _chunk(header: Header) -> int:
    """Tokens of a prompt chunk where the user gives none."""
    costs: CostModel = recorded_costs(header)
    return default_chunk(lambda shape: max(costs.batch_ns(r, shape) for r in range(len(header.plan.replicas))))


def _memory(header: Header, chunk: int) -> MemoryConfig:
    return MemoryConfig(
        dtype=header.costs["dtype"], kv_dtype=header.kv_dtype, block_tokens=header.brain.block_tokens,
        max_batch_tokens=chunk + header.brain.max_num_seqs,
    )  # fmt: skip


def _kv_room(header: Header, memory: MemoryConfig) -> Bytes:
    """Bytes of KV on the device that held the most."""
    held = [
        blocks * block_bytes(shard, stage, header.model, memory)
        for blocks, replica in zip(header.kv_blocks, header.plan.replicas, strict=True)
        for stage in replica.stages
        for shard in stage.shards
    ]
    return Bytes(max(held))
