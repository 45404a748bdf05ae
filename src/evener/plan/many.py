"""Plans of many devices: a pool of good replicas, and the mix of them that serves the most.

Devices of one kind on one host are interchangeable, so a replica is a *pattern*: how many tensor-parallel units of
which kind and size. Patterns grow by one unit at a time in a beam, widest where little is known; then a mixed-integer
program (HiGHS through scipy) chooses how often to use each within the devices there are. Tensor parallelism stays
inside a host and among equal devices here; over hosts and unlike devices, pipelines do the same for less traffic.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from evener.plan.capacity import plan_load
from evener.plan.pipeline import Candidate, build_replica
from evener.plan.problem import Problem
from evener.plan.stages import Group, Stages

BEAM = 24
"""Patterns kept per number of units, for each of two orders of merit."""
QUICK = 8
"""Mixes of like replicas that are kept for their predicted time."""
MOST_UNITS = 32
"""Stages of a replica at most."""
SECONDS = 10.0
"""Limit of one mixed-integer solution; what is best by then is taken."""


class Unit(NamedTuple):
    """So many devices of one kind on one host."""

    kind: int
    size: int


Pattern = tuple[Unit, ...]
"""Units of a replica, sorted; what repeats is repeated."""


class Stock:
    """The devices by host and kind, and how they are handed out."""

    def __init__(self, stages: Stages) -> None:
        self.hosts: dict[tuple[str, int], list[str]] = {}
        for d in stages.among:
            self.hosts.setdefault((d.host, stages.kind[d.name]), []).append(d.name)
        sizes: dict[Unit, int] = {}
        for (_, kind), names in self.hosts.items():
            have = len(names)
            for size in {1 << k for k in range(have.bit_length()) if 1 << k <= have} | {have}:
                sizes[Unit(kind, size)] = sizes.get(Unit(kind, size), 0) + have // size
        self.limits = sizes
        """Units of each sort if nothing else is used."""

    def devices(self, kind: int) -> int:
        """How many there are of a kind."""
        return sum(len(names) for (_, k), names in self.hosts.items() if k == kind)

    def hand_out(self, patterns: Sequence[Pattern]) -> list[list[Group]] | None:
        """Names for every unit; large units first, a replica's units on as few hosts as can be. None if short."""
        free = {key: list(names) for key, names in self.hosts.items()}
        order = sorted((-unit.size, p, k) for p, pattern in enumerate(patterns) for k, unit in enumerate(pattern))
        out: list[list[Group]] = [[()] * len(pattern) for pattern in patterns]
        used: dict[int, dict[str, int]] = {}
        for _, p, k in order:
            unit = patterns[p][k]
            fits = [key for key, names in free.items() if key[1] == unit.kind and len(names) >= unit.size]
            if not fits:
                return None
            mine = used.setdefault(p, {})
            key = min(fits, key=lambda key: (-mine.get(key[0], 0), len(free[key]), key))
            out[p][k] = tuple(free[key][: unit.size])
            del free[key][: unit.size]
            mine[key[0]] = mine.get(key[0], 0) + 1
        return out


class _Pool:
    """Patterns and their best candidates."""

    def __init__(self, problem: Problem, stages: Stages, stock: Stock) -> None:
        self.problem, self.stages, self.stock = problem, stages, stock
        self.weight = self._weights()
        self.found: dict[Pattern, Candidate | None] = {}
        most = problem.max_num_seqs
        self.targets = sorted({most, max(1, most * 2 // 3), max(1, most // 2), max(1, most // 4), max(1, most // 8), 1})
        self.targets.reverse()

    def _weights(self) -> dict[int, float]:
        """Relative speed of a kind: layers per second of the settled batch on one device."""
        shape = self.problem.demand.settled(min(self.problem.max_num_seqs, 32))
        out = {}
        for d in self.stages.among:
            kind = self.stages.kind[d.name]
            if kind not in out:
                option = self.stages.option((d.name,), first=False, last=False)
                out[kind] = 1e9 / option.times(shape)[1] if option is not None else 0.0
        return out

    def candidate(self, pattern: Pattern, polish: bool = False) -> Candidate | None:
        """The best order of the units: like units beside each other, every sort tried at the end and the start."""
        if not polish and pattern in self.found:
            return self.found[pattern]
        handed = self.stock.hand_out([pattern])
        best = None
        for groups in self.orders(pattern, handed[0]) if handed is not None else ():
            got = build_replica(self.problem, self.stages, groups, None if polish else self.targets, polish)
            if got is not None and (best is None or got.capacity.requests_s > best.capacity.requests_s):
                best = got
        if not polish:
            self.found[pattern] = best
        return best

    def orders(self, pattern: Pattern, groups: Sequence[Group]) -> Iterator[list[Group]]:
        """Fast first, with each sort once at the end, and once at the start."""
        ranked = sorted(
            range(len(pattern)), key=lambda k: (-self.weight[pattern[k].kind] * pattern[k].size, pattern[k], groups[k])
        )
        sorts = list(dict.fromkeys(pattern[k] for k in ranked))
        seen = set()
        for start in sorts:
            for end in sorts:
                order = list(ranked)
                first = next(k for k in order if pattern[k] == start)
                order.remove(first)
                last = next((k for k in reversed(order) if pattern[k] == end), None)
                if last is None and len(pattern) > 1:
                    continue
                if last is not None:
                    order.remove(last)
                    order.append(last)
                order.insert(0, first)
                key = tuple(pattern[k] for k in order)
                if key not in seen:
                    seen.add(key)
                    yield [groups[k] for k in order]

    def speed(self, pattern: Pattern) -> float:
        """Sum of the devices' relative speeds; never 0, also where no device alone holds a layer."""
        return sum(self.weight[u.kind] * u.size for u in pattern) or 1.0

    def memory(self, pattern: Pattern) -> float:
        """Layers that the pattern could hold: how near it is to holding the model."""
        held = 0.0
        for unit in pattern:
            handed = self.stock.hand_out([(unit,)])
            option = self.stages.option(handed[0][0], first=False, last=False) if handed else None
            held += option.most_layers(self.problem.least_blocks()) if option is not None else 0
        return held


def grow(pool: _Pool) -> list[Pattern]:
    """All patterns met that can serve, by beam search over the number of units."""
    sorts = sorted(pool.stock.limits)
    level: list[Pattern] = [(unit,) for unit in sorts]
    served: list[Pattern] = []
    for _ in range(min(MOST_UNITS, pool.problem.model.layers)):
        good, short = [], []
        for pattern in level:
            candidate = pool.candidate(pattern)
            if candidate is not None:
                served.append(pattern)
                good.append((-candidate.capacity.requests_s / pool.speed(pattern), pattern))
            else:
                short.append((-pool.memory(pattern) / len(pattern), pattern))
        kept = [p for _, p in sorted(good)[:BEAM]]
        # Beside the best, some of each make-up of kinds: pure and mixed ones, and those that cannot hold the model yet.
        kept += [p for p in _of_each(good, 3) if p not in kept][:BEAM] + _of_each(short, max(2, BEAM // 4))[: 2 * BEAM]
        following: set[Pattern] = set()
        for pattern in kept:
            for unit in sorts:
                grown = tuple(sorted((*pattern, unit)))
                if grown not in following and pool.stock.hand_out([grown]) is not None:
                    following.add(grown)
        level = sorted(following)
        if not level:
            break
    return served


def _of_each(ranked: list[tuple[float, Pattern]], count: int) -> list[Pattern]:
    """The first `count` patterns of each set of kinds."""
    taken: dict[frozenset[int], int] = {}
    out = []
    for _, pattern in sorted(ranked):
        kinds = frozenset(u.kind for u in pattern)
        taken[kinds] = taken.get(kinds, 0) + 1
        if taken[kinds] <= count:
            out.append(pattern)
    return out


def choose(pool: _Pool, patterns: Sequence[Pattern], most_replicas: int | None = None) -> list[Pattern]:
    """How often to use each pattern, for the most requests per second; as a list with repeats."""
    if not patterns:
        return []
    rates = []
    for p in patterns:
        candidate = pool.candidate(p)
        assert candidate is not None
        rates.append(candidate.capacity.requests_s)
    value = np.array(rates)
    rows, limits = [], []
    for kind in sorted({u.kind for p in patterns for u in p}):
        sizes = sorted({u.size for u in pool.stock.limits if u.kind == kind})
        rows.append([sum(u.size for u in p if u.kind == kind) for p in patterns])
        limits.append(pool.stock.devices(kind))
        # Units of at least this size, counted in units of it: so many fit the hosts.
        for size in sizes[1:]:
            rows.append([sum(u.size // size for u in p if u.kind == kind) for p in patterns])
            limits.append(pool.stock.limits[Unit(kind, size)])
    if most_replicas is not None:
        rows.append([1] * len(patterns))
        limits.append(most_replicas)
    import scipy.optimize  # a quarter of a second that most commands need not spend

    highs: Any = scipy.optimize
    # A replica more must bring a little: without it ties are broken towards many small replicas at random.
    solved = highs.milp(
        -value / value.max() + 1e-6,
        integrality=np.ones(len(patterns)),
        bounds=highs.Bounds(0, np.inf),
        constraints=highs.LinearConstraint(np.array(rows, dtype=float), ub=np.array(limits, dtype=float)),
        options={"time_limit": SECONDS, "mip_rel_gap": 1e-3},
    )
    if solved.x is None:
        return []
    return [p for p, n in zip(patterns, np.rint(solved.x).astype(int), strict=True) for _ in range(n)]


def plans_of_many(problem: Problem, stages: Stages) -> list[tuple[Candidate, ...]]:
    """Mixes of replicas: the best, and the best of few replicas, of short pipelines, and of one kind of device each."""
    stock = Stock(stages)
    pool = _Pool(problem, stages, stock)
    patterns = grow(pool)
    out: list[tuple[Candidate, ...]] = []
    asked: list[tuple[list[Pattern], int | None]] = [(patterns, None), *((patterns, n) for n in (1, 2, 3, 4, 6, 8))]
    asked += [([p for p in patterns if len(p) <= n], None) for n in (2, 4, 8, 12)]
    asked.append(([p for p in patterns if len({u.kind for u in p}) == 1], None))
    if problem.bounds.tpot is not None:
        quick = [p for p in patterns if (c := pool.candidate(p)) and c.capacity.tpot <= problem.bounds.tpot]
        asked.append((quick, None))
    seen = set()
    for allowed, most in asked:
        chosen = choose(pool, allowed, most)
        if not chosen or tuple(chosen) in seen:
            continue
        seen.add(tuple(chosen))
        if (plan := _build(pool, chosen)) is not None:
            out.append(plan)
    for chosen in quick_mixes(pool, patterns):
        if tuple(chosen) not in seen and (plan := _build(pool, chosen)) is not None:
            out.append(plan)
    return out


def quick_mixes(pool: _Pool, patterns: Sequence[Pattern]) -> list[list[Pattern]]:
    """Where time counts: several replicas of one pattern, those with the shortest predicted time under the rate."""
    demand = pool.problem.demand
    if demand.rate is None and not pool.problem.bounds:
        return []
    timed: list[tuple[float, list[Pattern]]] = []
    for p in dict.fromkeys(patterns):
        candidate = pool.candidate(p)
        assert candidate is not None
        devices: dict[int, int] = {}
        for unit in p:
            devices[unit.kind] = devices.get(unit.kind, 0) + unit.size
        most = min(pool.stock.devices(kind) // n for kind, n in devices.items())
        least = 1 if demand.rate is None else math.floor(demand.rate / candidate.capacity.requests_s) + 1
        for copies in {least, (least + most) // 2, most} if least <= most else ():
            load = plan_load([candidate.capacity] * copies, demand.rate, demand.output_tokens)
            timed.append((load.e2e, [p] * copies))
    return [chosen for _, chosen in sorted(timed)[:QUICK]]


def _build(pool: _Pool, chosen: Sequence[Pattern]) -> tuple[Candidate, ...] | None:
    handed = pool.stock.hand_out(chosen)
    if handed is None:
        return None
    out = []
    for pattern, groups in zip(chosen, handed, strict=True):
        best = None
        for order in pool.orders(pattern, groups):
            got = build_replica(pool.problem, pool.stages, order)
            if got is not None and (best is None or got.capacity.requests_s > best.capacity.requests_s):
                best = got
        if best is None:
            return None
        out.append(best)
    return tuple(out)
