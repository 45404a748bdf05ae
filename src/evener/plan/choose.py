"""Chooses among plans that were tried, and keeps those that no other beats in every respect."""

import math
from collections.abc import Sequence

from evener.plan.problem import Problem
from evener.plan.search import Scored
from evener.plan.trial import Tried

CLOSE = 0.02
"""Plans within this share of the best count as equal in the first respect; the second then decides."""
SAME = 0.005
"""The same for throughput, where nothing else is wished for: then capacity by the cost model decides."""


def goal_of(problem: Problem) -> str:
    """What counts as best, in words."""
    if problem.bounds:
        return "goodput"
    return "latency at the stated rate" if problem.demand.rate is not None else "throughput"


def best_tried(problem: Problem, tried: Sequence[Tried]) -> Tried:
    """The best plan. With bounds: most goodput. Under a rate: the shortest mean time among those that keep up; where
    any can serve the rate by the cost model, only such plans count, as a short sample does not show a queue that grows.

    Without either: the most output tokens per second. What is close in that is decided by mean time, or by capacity;
    what then is equal, by fewer devices and by name, so that the choice is the same every time.
    """
    assert tried, "nothing was tried"
    rate = problem.demand.rate
    if rate is not None and not problem.finite:
        tried = [t for t in tried if t.load.requests_s >= rate] or tried
    # Where the sample is too small to fill the plan with the most rows, it says nothing of full plans.
    filled = all(t.filled for t in tried)
    top = max(first_merit(problem, t, filled) for t in tried)
    latency = rate is not None or bool(problem.bounds)
    close = [t for t in tried if first_merit(problem, t, filled) >= top * (1 - (CLOSE if latency else SAME))]
    if latency:
        return min(close, key=lambda t: (t.e2e.mean, len(t.plan.devices()), t.plan.devices()))
    return min(close, key=lambda t: (-t.load.tokens_s, len(t.plan.devices()), t.plan.devices()))


def first_merit(problem: Problem, t: Tried, filled: bool = True) -> float:
    """What is compared first; more is better. `filled`: the sample was large enough to fill every plan."""
    if problem.bounds:
        return t.goodput
    if problem.demand.rate is not None:
        return t.requests_s
    if problem.finite:
        return t.tokens_s
    return t.full_tokens_s if filled else t.load.tokens_s


def shortlist(problem: Problem, scored: Sequence[Scored], count: int) -> list[Scored]:
    """Plans to simulate: the best by capacity and, where time counts, the best by predicted time, in turn."""
    by_rate = sorted(scored, key=lambda s: -s.load.requests_s)
    if problem.demand.rate is None and not problem.bounds:
        return by_rate[:count]
    by_time = sorted(scored, key=lambda s: (s.load.e2e if math.isfinite(s.load.e2e) else 1e18, -s.load.requests_s))
    out: list[Scored] = []
    for pair in zip(by_time, by_rate, strict=True):
        for s in pair:
            if s not in out and len(out) < count:
                out.append(s)
    return out


def pareto(tried: Sequence[Tried]) -> list[Tried]:
    """Plans that no other equals or beats in capacity, p90 TTFT, p90 TPOT and memory together; most capacity first."""

    def merits(t: Tried) -> tuple[float, ...]:
        return (-t.load.tokens_s, t.ttft.p90, t.tpot.p90, float(t.memory))

    out: list[Tried] = []
    for t in sorted(tried, key=merits):
        mine = merits(t)
        if not any(all(a <= b for a, b in zip(merits(o), mine, strict=True)) for o in out):
            out.append(t)
    return out
