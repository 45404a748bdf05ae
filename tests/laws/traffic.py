"""Random plans, traffic and failures for the law tests, and a cost model of three lines."""

import random
from typing import NamedTuple

from hypothesis import strategies as st
from msgspec import structs

from evener.brain import Brain, BrainConfig
from evener.cost.base import BatchShape, DecodeRun, ShardTime, stepwise_run
from evener.engine.request import Request
from evener.execute.sim.body import Failure, SimRequest, Simulator
from evener.ledger.ledger import Ledger
from evener.ledger.spans import Journal
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds

SLOTS = 8


class SimpleCosts:
    """A fixed part, a part per row and one per key; stage s takes (s + 1) times as long, replica r (r + 1) times."""

    version = 0

    def __init__(self, stages: int, ranks: int = 1) -> None:
        self.stages, self.ranks = stages, ranks

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        if not shape.tokens:
            return Nanoseconds(0)
        one = 1_000_000 + shape.tokens * 200_000 + shape.prefill_pairs * 10 + shape.decode_context * 50
        return Nanoseconds(one * (stage + 1) * (replica + 1))

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> list[ShardTime]:
        """Two shards if there are any: rank 1 is slower, rank 0 waits for it; a tenth goes into moving."""
        whole = self.stage_ns(replica, stage, shape)
        host = min(50_000, whole)
        moving = (whole - host) // 10 if self.ranks > 1 else 0
        slow = whole - host - moving
        out = []
        for rank in range(self.ranks):
            compute = slow * (rank + 1) // self.ranks
            contended = compute // 7
            out.append(ShardTime(host, compute - contended, contended, slow - compute, moving))
        return out

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        return stepwise_run(self, replica, stage, rows, context, steps)

    def delay_ns(self, replica: int, stage: int) -> Nanoseconds:
        return Nanoseconds(0 if stage == self.stages - 1 else 300_000)

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return self.stage_ns(replica, self.stages - 1, shape)

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return Nanoseconds(sum(self.stage_ns(replica, s, shape) for s in range(self.stages)))

    def error(self) -> None:
        return None


class AlikeCosts(SimpleCosts):
    """All shards of a stage are equal: nobody waits for anybody."""

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> list[ShardTime]:
        slowest = super().shards_ns(replica, stage, shape)[-1]
        return [slowest] * self.ranks


class Case(NamedTuple):
    """One random situation; everything follows from it."""

    seed: int
    policy: str
    stages: int
    replicas: int
    kv_blocks: int
    requests: int
    cancels: bool
    fails: bool
    ranks: int = 1
    output: str = "any"
    """`long`: few requests end while others decode, so that steps repeat."""


cases = st.builds(
    Case,
    seed=st.integers(0, 10_000),
    policy=st.sampled_from(["equal-time", "fcfs", "static"]),
    stages=st.integers(1, 3),
    replicas=st.integers(1, 3),
    kv_blocks=st.sampled_from([19, 25, 60, 400]),
    requests=st.integers(1, 40),
    cancels=st.booleans(),
    fails=st.booleans(),
    ranks=st.integers(1, 2),
    output=st.sampled_from(["any", "long"]),
)


def make_plan(stages: int, replicas: int, ranks: int = 1) -> Plan:
    """Devices are named d<replica>.<stage>, and d<replica>.<stage>#<rank> from the second rank on."""

    def shards(r: int, s: int) -> tuple[Shard, ...]:
        return tuple(Shard(f"d{r}.{s}" + (f"#{k}" if k else ""), (k, k + 1), (k, k + 1)) for k in range(ranks))

    return Plan(tuple(Replica(tuple(Stage((s, s + 1), shards(r, s)) for s in range(stages))) for r in range(replicas)))


def make_brain(case: Case, journal: Journal | None = None) -> Brain:
    config = BrainConfig(policy=case.policy, max_num_seqs=SLOTS, max_num_batched_tokens=64, static_batch=4)
    plan = make_plan(case.stages, case.replicas, case.ranks)
    return Brain(plan, [case.kv_blocks] * case.replicas, SimpleCosts(case.stages, case.ranks), config, journal)


def make_traffic(case: Case) -> list[SimRequest]:
    """Bursty arrivals, lengths over two orders of magnitude, shared prefixes, some priorities, some cancellations."""
    rng = random.Random(case.seed)
    traffic, at = [], 0
    for i in range(case.requests):
        if rng.random() < 0.6:
            at += int(rng.expovariate(1) * 3e7)
        prompt_len = rng.choice([1, 15, 16, 17, rng.randint(1, 200)])
        cap = rng.choice([1, rng.randint(1, 100)]) if case.output == "any" else rng.randint(50, 100)
        keys = [hash((i % 5, k)) for k in range(prompt_len // 16)]
        request = Request(
            f"r{i}", prompt_len, cap, block_keys=keys, priority=rng.choice([0, 0, 0, 1, -1]),
        )  # fmt: skip
        cancel = at + int(rng.expovariate(1) * 3e8) if case.cancels and rng.random() < 0.3 else None
        truth = rng.choice([0, rng.randint(0, 120)]) if case.output == "any" else rng.randint(40, 300)
        traffic.append(SimRequest(request, Nanoseconds(at), truth, None if cancel is None else Nanoseconds(cancel)))
    return traffic


def make_simulator(
    case: Case, brain: Brain | None = None, ledger: Ledger | None = None, fast: bool = False, longer: int = 0
) -> Simulator:
    """`longer`: by how much every true output is longer than the case says."""
    failures = []
    if case.fails and case.replicas > 1:
        failures = [Failure("d0.0", Nanoseconds(400_000_000))]
    traffic = [structs.replace(t, output_len=t.output_len + longer) for t in make_traffic(case)]
    costs = SimpleCosts(case.stages, case.ranks)
    brain = brain or make_brain(case, ledger)
    return Simulator(brain, costs, traffic, failures, 200_000, ledger=ledger, fast=fast)


def make_ledger(case: Case) -> Ledger:
    """One for the brain and the simulator of a case."""
    plan = make_plan(case.stages, case.replicas, case.ranks)
    return Ledger(plan, SimpleCosts(case.stages, case.ranks), start=Nanoseconds(0), resolution=None)
