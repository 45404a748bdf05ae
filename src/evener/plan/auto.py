"""The layout that `evener serve` chooses by itself when it is told none."""

import numpy as np

from evener.cost.rates import Profile
from evener.plan.default import default_plan
from evener.plan.explain import headline
from evener.plan.planner import choose_plan
from evener.plan.problem import Item, Problem, demand_of
from evener.spec.cluster import Cluster
from evener.spec.memory import MemoryConfig
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.spec.traffic import TrafficMix
from evener.units import Bytes, Seconds

REQUESTS = 128
TRIALS = 3
SIGMA = 0.8
"""Spread of the lengths around their means (of the logarithm): chat traffic has about this much."""


def spread_items(mix: TrafficMix, longest: int, count: int = REQUESTS) -> tuple[Item, ...]:
    """Requests with the means of a mix and log-normal lengths, none longer than `longest`; always the same."""
    rng = np.random.default_rng(0)

    def draw(mean: float, most: int) -> list[int]:
        values = rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, count)
        values *= mean / values.mean()
        return [int(x) for x in np.clip(np.rint(values), 1, max(1, most))]

    inputs, outputs = draw(mix.input_tokens, longest * 3 // 4), draw(mix.output_tokens, longest // 4)
    return tuple(Item(Seconds(0.0), i, o) for i, o in zip(inputs, outputs, strict=True))


def choose_layout(
    model: ModelSpec, cluster: Cluster, profile: Profile, mix: TrafficMix, memory: MemoryConfig, kv_bytes: Bytes | None,
    max_num_seqs: int, policy: str, host_bytes: Bytes | None = None,
) -> tuple[Plan, str]:  # fmt: skip
    """The plan that serves the most of this mix, and why in one line. Raises InvalidPlan when nothing fits."""
    if len(cluster.devices) == 1:
        return default_plan(model, cluster.devices, 1, 1, 1, profile, mix, memory=memory), ""
    items = spread_items(mix, model.max_position)
    problem = Problem(
        model=model, cluster=cluster, profile=profile, demand=demand_of(items, cached=mix.cached), items=items,
        memory=memory, kv_bytes=kv_bytes, max_num_seqs=max_num_seqs, policy=policy, finite=True,
        host_bytes=host_bytes,
    )  # fmt: skip
    choice = choose_plan(problem, trials=TRIALS, requests=REQUESTS)
    return choice.best.plan, headline(choice)
