"""What a replica serves once its batches have settled: rows at once, time per token, requests per second.

Rows are bound by `max_num_seqs` and by KV room: the stage with the fewest blocks decides, as every stage needs every
block. A pipeline of S stages runs its rows in G groups; a group steps every max(slowest stage, round trip / G). Every
step also carries the prompts that replace what the rows finish, no more of them than a batch takes: with long prompts
and short answers it is the prompts that bound the rows.
"""

import math
from collections.abc import Callable, Sequence
from typing import Literal

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.engine.policy import group_count
from evener.plan.problem import Problem
from evener.units import NS_PER_S

CHUNK_NS = NS_PER_S // 2
"""A prompt chunk of the default size takes at most about this long: it is what a decoding row may have to wait."""
CHUNKS = (2048, 1024, 512, 256, 128, 64)

StageTimes = Callable[[BatchShape], Sequence[int]]
"""Nanoseconds of each stage of a replica for a batch."""


def default_chunk(times: Callable[[BatchShape], int], most: int = CHUNKS[0]) -> int:
    """Tokens of a prompt chunk: the largest of `CHUNKS` up to `most` that `times` says stays within half a second."""
    for tokens in CHUNKS:
        shape = BatchShape(prefill_tokens=tokens, prefill_pairs=tokens * (tokens + 1) // 2, chunks=1)
        if tokens <= most and times(shape) <= CHUNK_NS:
            return tokens
    return min(most, CHUNKS[-1])


class Capacity(Struct, frozen=True):
    """A replica at its limit. Rates per second, times in seconds."""

    rows: int
    """Requests that hold KV at once."""
    blocks: int
    groups: int
    requests_s: float
    tokens_s: float
    """Output tokens."""
    tpot: float
    """From one token of a row to its next, at the limit."""
    alone: float
    """A mean request on an idle replica, from arrival to its last token."""
    prompt: float
    """Of that, its prefill."""
    bound: Literal["rows", "kv", "prompts"]
    """What keeps more rows from running: the sequence limit, KV room, or the prompts each batch must take in."""
    slowest: int
    """Stage that decides the pace."""
    stage_ns: tuple[int, ...]
    """Of the settled batch, by stage."""


def replica_capacity(problem: Problem, times: StageTimes, blocks: int, delay_ns: int = 0) -> Capacity:
    """The limit of a replica with these stage times, so many KV blocks, and `delay_ns` of links in its round trip."""
    demand = problem.demand
    by_kv = int(blocks * problem.memory.block_tokens / demand.kv_tokens())
    rows = max(1, min(problem.max_num_seqs, by_kv))
    probe = times(BatchShape(decode_rows=8, decode_context=8 * 512, sampled_rows=8))
    # A group without a row does not step.
    groups = min(rows, group_count(len(probe), sum(probe) + delay_ns, max(probe)))
    chunk = default_chunk(lambda shape: max(times(shape)), problem.most_batch_tokens)
    row_limit = rows / groups
    prompt_limit = chunk * demand.output_tokens / max(1.0, demand.computed)
    per_group = min(row_limit, prompt_limit)
    stage_ns = tuple(times(demand.settled(per_group)))
    beat = max(max(stage_ns), (sum(stage_ns) + delay_ns) / groups)
    tokens_s = per_group / beat * NS_PER_S
    chunks = max(1.0, demand.computed / chunk)
    prompt = times(demand.prompt())
    # The chunks of a long prompt follow each other through the pipeline.
    prefill = (max(prompt) * (1 - 1 / chunks) + (sum(prompt) / chunks) + delay_ns) / NS_PER_S
    step = (sum(times(demand.decode(1))) + delay_ns) / NS_PER_S
    return Capacity(
        rows=rows,
        blocks=blocks,
        groups=groups,
        requests_s=tokens_s / demand.output_tokens,
        tokens_s=tokens_s,
        tpot=beat * groups / NS_PER_S,
        alone=prefill + step * (demand.output_tokens - 1),
        prompt=prefill,
        bound="prompts" if prompt_limit < row_limit else "kv" if by_kv < problem.max_num_seqs else "rows",
        slowest=stage_ns.index(max(stage_ns)),
        stage_ns=stage_ns,
    )


def plan_times(costs: CostModel, replica: int, stages: int) -> tuple[StageTimes, int]:
    """Stage times of a replica of a whole plan, and the delay of its links, from the cost model."""

    def times(shape: BatchShape) -> list[int]:
        return [costs.stage_ns(replica, s, shape) for s in range(stages)]

    one = BatchShape(decode_rows=1, decode_context=1, sampled_rows=1)
    return times, max(0, costs.latency_ns(replica, one) - sum(times(one)))


class Load(Struct, frozen=True):
    """Predicted figures of a whole plan, without simulation."""

    requests_s: float
    """Capacity."""
    tokens_s: float
    e2e: float
    """Seconds of a mean request under the stated rate (inf where the rate exceeds the capacity); idle without one."""
    replicas: tuple[Capacity, ...]


def plan_load(capacities: Sequence[Capacity], rate: float | None, output_tokens: float) -> Load:
    """Add replicas up. Under a rate, each takes its share of it; waiting grows as 1 / (1 - utilisation)."""
    total = sum(c.requests_s for c in capacities)
    used = min(1.0, rate / total) if rate is not None else 0.0
    e2e = 0.0
    for c in capacities:
        share = c.requests_s / total
        # Between idle and full, a step gets longer in proportion to the rows it carries.
        idle_step = (c.alone - c.prompt) / max(1.0, output_tokens - 1)
        step = idle_step + (max(c.tpot, idle_step) - idle_step) * used
        e2e += share * (c.prompt / (1 - used) + step * output_tokens) if used < 1 else math.inf
    return Load(total, sum(c.tokens_s for c in capacities), e2e, tuple(capacities))
