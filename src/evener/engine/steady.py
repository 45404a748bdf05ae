"""Many decode steps of a replica at once, where nothing else can happen: what lets a simulator skip them (law 9)."""

from typing import TYPE_CHECKING

from evener.cost.base import BatchShape
from evener.engine.in_flight import InFlight
from evener.engine.sequence import State
from evener.ledger.spans import MakeUp

if TYPE_CHECKING:
    from evener.engine.replica import ReplicaEngine


def steady_steps(replica: "ReplicaEngine", most: int) -> int:
    """How many of the next batches (up to `most`) are plain decode steps of the present rows, as far as known here.

    In the last of them rows may sample their last token. Those in flight are plain steps already. True ends,
    arrivals and cancellations may end that earlier, and are for the caller to see. 0 where that cannot be said,
    though it may be so.
    """
    group = replica.groups[0]
    if (
        len(replica.groups) > 1 or not replica.policy.repeats or len(replica.in_flight) < replica.config.depth
        or not group.rows or group.pending or group.leaving or replica.prompts or replica.limbo
        or replica.dropped_slots or replica.table_changes
        # Whoever waits for blocks goes on waiting; if nobody does, the next batch composed will say so.
        or bool(replica.waiting.rows and replica.free_slots) is not replica.short_of_kv
    ):  # fmt: skip
        return 0
    rows = group.snapshot()
    for record in replica.in_flight:
        if record.rows is not rows or record.capped:
            return 0
    steps = min(most, group.steps_to_cap() + 1)
    available = replica.pool.available
    if available < len(rows) * (1 + steps // replica.config.block_tokens):
        while steps and sum(len(of) * count for of, count in group.blocks_of(steps)) > available:
            steps //= 2
    return steps


def skip(replica: "ReplicaEngine", steps: int) -> None:
    """Do at once what so many results and issues do, within `steady_steps`; `land` before anything else is done."""
    group = replica.groups[0]
    for rows, count in group.blocks_of(steps):
        blocks = replica.pool.allocate(len(rows) * count)
        assert blocks is not None, "a run of steps took more KV blocks than there were"
        if count == 1:
            for seq, block in zip(rows.values(), blocks, strict=True):
                seq.blocks.append(block)
        else:
            for k, seq in enumerate(rows.values()):
                seq.blocks += blocks[k * count : (k + 1) * count]
    before = min(steps, group.steps_to_cap())
    replica.next_batch_id += steps
    replica.completed_id += steps
    group.advance(replica.next_batch_id - 1, before)
    if before < steps:  # the last one
        replica.capped = group.last_tokens()
        group.advance(replica.next_batch_id - 1)
        for seq in replica.capped:
            group.remove(seq)
            seq.state = State.DRAINING


def land(replica: "ReplicaEngine") -> int:
    """After `skip`: the two steps issued last are in flight. The number of the first of them."""
    group = replica.groups[0]
    rows = replica.in_flight[-1].rows
    n, context = len(rows), group.context
    capped, replica.capped = replica.capped, []
    for seq in capped:
        context += seq.length
    replica.in_flight.clear()
    for back in (2, 1):
        shape = BatchShape(decode_rows=n, decode_context=context - n * back, sampled_rows=n)
        batch_id = replica.next_batch_id - back
        record = InFlight(batch_id, group, rows, capped if back == 1 else [], shape, MakeUp(shape))
        record.step = group.steps - back + 1
        replica.in_flight.append(record)
    replica.late_rows = 0
    return replica.next_batch_id - 2
