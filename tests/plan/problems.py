"""Random planning problems, a cost model of a few lines, and the search that leaves nothing out."""

import itertools
import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

from evener.cost.base import BatchShape, DecodeRun, ShardTime, stepwise_run
from evener.cost.device import DeviceCosts
from evener.cost.rates import default_profile
from evener.errors import InvalidPlan
from evener.plan.capacity import plan_times, replica_capacity
from evener.plan.default import split_stage
from evener.plan.problem import Item, Problem, demand_of
from evener.plan.search import plan_blocks
from evener.spec.cluster import Cluster, Device, parse_device
from evener.spec.memory import MemoryConfig
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage, size
from evener.units import Bytes, Nanoseconds, Seconds

TINY = ModelSpec("llama", vocab=512, hidden=64, layers=6, heads=8, kv_heads=4, head_dim=8, ffn=256, max_position=1024)


class SimpleCosts:
    """The slowest shard of every phase, a fixed part per layer, and a collective where there is more than one rank."""

    version = 0

    def __init__(self, model: ModelSpec, plan: Plan, cluster: Cluster) -> None:
        self.model, self.plan = model, plan
        self.slow = {d.name: d.slowdown for d in cluster.devices}

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        if not shape.tokens:
            return Nanoseconds(0)
        of, last = self.plan.replicas[replica].stages[stage], len(self.plan.replicas[replica].stages) - 1
        model, rows = self.model, 4 + shape.tokens
        pairs = shape.prefill_pairs + shape.decode_context
        heads = max((rows * 40 + pairs) * size(sh.heads) * self.slow[sh.device] for sh in of.shards)
        ffn = max(rows * 9 * size(sh.ffn) * self.slow[sh.device] for sh in of.shards)
        together = 2 * (4000 + 20 * rows) if len(of.shards) > 1 else 0
        time = 50_000 + size(of.layers) * (heads + ffn + together)
        if stage == last:
            sampled = 4 + shape.sampled_rows
            time += max(sampled * size(sh.head_rows) * self.slow[sh.device] for sh in of.shards)
        else:
            time += 3000 + 10 * rows
        assert model.layers
        return Nanoseconds(int(time))

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> Sequence[ShardTime]:
        whole = self.stage_ns(replica, stage, shape)
        return [ShardTime(0, whole, 0, 0, 0)] * len(self.plan.replicas[replica].stages[stage].shards)

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        return stepwise_run(self, replica, stage, rows, context, steps)

    def delay_ns(self, replica: int, stage: int) -> Nanoseconds:
        return Nanoseconds(0)

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return max(self.stage_ns(replica, s, shape) for s in range(len(self.plan.replicas[replica].stages)))

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        stages = range(len(self.plan.replicas[replica].stages))
        return Nanoseconds(sum(self.stage_ns(replica, s, shape) for s in stages))

    def error(self) -> None:
        return None


class Situation(NamedTuple):
    """What a random problem is made of."""

    slowdowns: tuple[float, ...]
    memories: tuple[int | None, ...]
    input_tokens: int
    output_tokens: int
    rows: int


def random_situation(rng: random.Random, most: int) -> Situation:
    """Devices up to eight times as slow as each other, some with little memory; short and long prompts."""
    n = rng.randint(2, most)
    # The whole model takes about 1.7 MB in fp32, KV and 0.6 MB of workspace apart: half of these cannot hold it alone.
    memory = rng.choice([None, 900_000, 1_500_000, 5_000_000])
    slow = tuple(rng.choice([1.0, 1.0, 1.5, 2.0, 4.0, 8.0]) for _ in range(n))
    memories = tuple(None if memory is None else memory * rng.choice([1, 1, 2]) for _ in range(n))
    return Situation(slow, memories, rng.choice([8, 64, 300]), rng.choice([4, 32, 200]), rng.choice([4, 16]))


def make_problem(situation: Situation, *, simple: bool = True, model: ModelSpec = TINY) -> Problem:
    """`simple`: with `SimpleCosts`, else with the roofline over assumed rates."""
    devices = [
        replace_memory(parse_device(f"cpu:{k},slowdown={s}"), m)
        for k, (s, m) in enumerate(zip(situation.slowdowns, situation.memories, strict=True))
    ]
    items = tuple(Item(Seconds(0.0), situation.input_tokens, situation.output_tokens) for _ in range(8))
    return Problem(
        model=model,
        cluster=Cluster(tuple(devices)),
        profile=default_profile(devices),
        demand=demand_of(items),
        items=items,
        memory=MemoryConfig(max_batch_tokens=16 + situation.rows),
        kv_bytes=None if None not in situation.memories else Bytes(400_000),
        max_num_seqs=situation.rows,
        factory=SimpleCosts if simple else None,
    )


def replace_memory(device: Device, memory: int | None) -> Device:
    import msgspec

    return msgspec.structs.replace(device, memory=None if memory is None else Bytes(memory))


def ordered_partitions(names: Sequence[str]) -> Iterator[list[tuple[str, ...]]]:
    """All ways to share names out over ordered, non-empty stages."""
    for stages in range(1, len(names) + 1):
        for where in itertools.product(range(stages), repeat=len(names)):
            if len(set(where)) == stages:
                yield [tuple(n for n, w in zip(names, where, strict=True) if w == s) for s in range(stages)]


def best_of_all(problem: Problem) -> float:
    """Requests per second of the best plan: every set of disjoint replicas, stages in every order, every layer split.

    Heads, columns and rows are split by the planner's own rule. 0 when nothing fits.
    """
    names = [d.name for d in problem.cluster.devices]
    best = {}
    for mask in range(1, 1 << len(names)):
        own = [n for k, n in enumerate(names) if mask >> k & 1]
        rates = [r for groups in ordered_partitions(own) for r in _every_split(problem, groups)]
        if rates:
            best[mask] = max(rates)
    whole = dict.fromkeys(range(1 << len(names)), 0.0)
    for mask in whole:
        for part, rate in best.items():
            if part & mask == part:
                whole[mask] = max(whole[mask], rate + whole[mask ^ part])
    return whole[len(whole) - 1]


def _every_split(problem: Problem, groups: Sequence[tuple[str, ...]]) -> Iterator[float]:
    model, n = problem.model, len(groups)
    shape = problem.demand.settled(min(problem.max_num_seqs, 32))
    parts: list[tuple[Shard, ...]] = []
    for s, group in enumerate(groups):
        costs = [DeviceCosts(problem.profile.device(x), model, alone=False) for x in group]
        parts.append(split_stage(model, list(group), costs, shape, first=s == 0, last=s == n - 1))
    for cuts in itertools.combinations(range(1, model.layers), n - 1):
        ends = [0, *cuts, model.layers]
        stages = tuple(Stage((ends[s], ends[s + 1]), parts[s]) for s in range(n))
        replica = Replica(stages)
        try:
            blocks = plan_blocks(problem, replica)
        except InvalidPlan:
            continue
        costs_ = problem.costs(Plan((replica,)), problem.cluster.devices)
        times, delay = plan_times(costs_, 0, n)
        yield replica_capacity(problem, times, blocks, delay).requests_s


def with_slowdown(problem: Problem, index: int, slowdown: float) -> Problem:
    """The same problem with one device of another speed."""
    import msgspec

    devices = list(problem.cluster.devices)
    devices[index] = msgspec.structs.replace(devices[index], slowdown=slowdown)
    return replace(problem, cluster=Cluster(tuple(devices)), profile=default_profile(devices))
