"""Every plan of a few devices: all ways to group them into stages, order the stages, and share them among replicas.

A replica is worth the same whatever the others do, so each set of devices is searched once: its best replica for
throughput, and its best for a lone request. Plans are then all partitions of all subsets of the devices, so that a
device which only slows the others is left out.
"""

from collections.abc import Iterator, Sequence

from evener.plan.pipeline import Candidate, build_replica, recut
from evener.plan.problem import Problem
from evener.plan.stages import Group, Stages

MOST_DEVICES = 5
"""Beyond, the number of plans (1,602 replicas of five devices, 18,000 of six) asks for another search."""

RECUT = 8
"""Replicas of a set of devices whose splits are reconsidered: those that serve the most."""


def ordered_groups(names: Sequence[str]) -> Iterator[tuple[Group, ...]]:
    """All ordered partitions of `names` into groups; within a group the order of `names` is kept."""
    if not names:
        yield ()
        return
    n = len(names)
    for mask in range(1, 1 << n):
        group = tuple(names[k] for k in range(n) if mask >> k & 1)
        rest = [names[k] for k in range(n) if not mask >> k & 1]
        for tail in ordered_groups(rest):
            yield (group, *tail)


def best_of(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The best for throughput, then (if it is another) the best for a lone request."""
    if not candidates:
        return []
    most = max(candidates, key=lambda c: c.capacity.requests_s)
    quick = min(candidates, key=lambda c: (c.capacity.alone, -c.capacity.requests_s))
    return [most] if quick is most else [most, quick]


def replicas_of_few(problem: Problem, stages: Stages, names: Sequence[str]) -> dict[int, list[Candidate]]:
    """For every set of the devices (a bit mask over `names`): its best replicas; sets that cannot serve are absent."""
    out: dict[int, list[Candidate]] = {}
    for mask in range(1, 1 << len(names)):
        own = [n for k, n in enumerate(names) if mask >> k & 1]
        found = []
        seen = set()
        for groups in ordered_groups(own):
            if not problem.cluster.links:
                kinds = tuple(tuple(sorted(stages.kind[n] for n in g)) for g in groups)
                if kinds in seen:
                    continue
                seen.add(kinds)
            candidate = build_replica(problem, stages, groups)
            if candidate is not None:
                found.append(candidate)
        if len(own) > 1:
            # A group that the rule splits badly may be the best when it is split well.
            most = sorted(found, key=lambda c: -c.capacity.requests_s)[:RECUT]
            found += [recut(problem, stages, c) for c in most]
        if best := best_of(found):
            out[mask] = best
    return out


def plans_of_few(problem: Problem, stages: Stages, names: Sequence[str]) -> list[tuple[Candidate, ...]]:
    """All sets of disjoint replicas; for each set of devices both its best replicas are used throughout."""
    best = replicas_of_few(problem, stages, names)
    out: list[tuple[Candidate, ...]] = []

    def extend(used: int, least: int, chosen: tuple[int, ...]) -> None:
        if chosen:
            for kind in (0, 1):
                picked = tuple(best[mask][min(kind, len(best[mask]) - 1)] for mask in chosen)
                if kind == 0 or any(len(best[mask]) > 1 for mask in chosen):
                    out.append(picked)
        for mask in best:
            if mask > least and not mask & used:
                extend(used | mask, mask, (*chosen, mask))

    extend(0, 0, ())
    return out
