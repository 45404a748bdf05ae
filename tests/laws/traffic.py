"""Random plans, traffic and failures for the law tests, and a cost model of three lines."""

import random
from typing import NamedTuple

from hypothesis import strategies as st

from evener.brain import Brain, BrainConfig
from evener.cost.base import BatchShape
from evener.engine.request import Request
from evener.execute.sim.body import Failure, SimRequest, Simulator
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds

SLOTS = 8


class SimpleCosts:
    """A fixed part, a part per row and one per key; stage s takes (s + 1) times as long, replica r (r + 1) times."""

    version = 0

    def __init__(self, stages: int) -> None:
        self.stages = stages

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        if not shape.tokens:
            return Nanoseconds(0)
        one = 1_000_000 + shape.tokens * 200_000 + shape.prefill_pairs * 10 + shape.decode_context * 50
        return Nanoseconds(one * (stage + 1) * (replica + 1))

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return self.stage_ns(replica, self.stages - 1, shape)

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return Nanoseconds(sum(self.stage_ns(replica, s, shape) for s in range(self.stages)))

    def error(self) -> None:
        return None


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
)


def make_plan(stages: int, replicas: int) -> Plan:
    """Devices are named d<replica>.<stage>."""
    return Plan(
        tuple(
            Replica(tuple(Stage((s, s + 1), (Shard(f"d{r}.{s}", (0, 1), (0, 1)),)) for s in range(stages)))
            for r in range(replicas)
        )
    )


def make_brain(case: Case) -> Brain:
    config = BrainConfig(policy=case.policy, max_num_seqs=SLOTS, max_num_batched_tokens=64, static_batch=4)
    plan = make_plan(case.stages, case.replicas)
    return Brain(plan, [case.kv_blocks] * case.replicas, SimpleCosts(case.stages), config)


def make_traffic(case: Case) -> list[SimRequest]:
    """Bursty arrivals, lengths over two orders of magnitude, shared prefixes, some priorities, some cancellations."""
    rng = random.Random(case.seed)
    traffic, at = [], 0
    for i in range(case.requests):
        if rng.random() < 0.6:
            at += int(rng.expovariate(1) * 3e7)
        prompt_len = rng.choice([1, 15, 16, 17, rng.randint(1, 200)])
        cap = rng.choice([1, rng.randint(1, 100)])
        keys = [hash((i % 5, k)) for k in range(prompt_len // 16)]
        request = Request(
            f"r{i}", prompt_len, cap, block_keys=keys, priority=rng.choice([0, 0, 0, 1, -1]),
        )  # fmt: skip
        cancel = at + int(rng.expovariate(1) * 3e8) if case.cancels and rng.random() < 0.3 else None
        truth = rng.choice([0, rng.randint(0, 120)])
        traffic.append(SimRequest(request, Nanoseconds(at), truth, None if cancel is None else Nanoseconds(cancel)))
    return traffic


def make_simulator(case: Case, brain: Brain | None = None) -> Simulator:
    failures = []
    if case.fails and case.replicas > 1:
        failures = [Failure("d0.0", Nanoseconds(400_000_000))]
    return Simulator(brain or make_brain(case), SimpleCosts(case.stages), make_traffic(case), failures, host_ns=200_000)
