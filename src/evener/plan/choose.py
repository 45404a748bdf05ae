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
    """The best plan. With bounds: most goodput. Under a rate: the shortest mean time among those that keep up.

    Without either: the most output tokens per second. What is close in that is decided by mean time, or by capacity;
    what then is equal, by fewer devices and by name, so that the choice is the same every time.
    """
    assert tried, "nothing was tried"

    top = max(first_merit(problem, t) for t in tried)
    latency = problem.demand.rate is not None or bool(problem.bounds)
    close = [t for t in tried if first_merit(problem, t) >= top * (1 - (CLOSE if latency else SAME))]
    if latency:
        return min(close, key=lambda t: (t.e2e.mean, len(t.plan.devices()), t.plan.devices()))
    return min(close, key=lambda t: (-t.load.tokens_s, len(t.plan.devices()), t.plan.devices()))


def first_merit(problem: Problem, t: Tried) -> float:
    """What is compared first; more is better."""
    if problem.bounds:
        return t.goodput
    if problem.demand.rate is not None:
        return t.requests_s
    return t.tokens_s if problem.finite else t.full_tokens_s


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
