"""One replica: groups of devices in stage order become stages, with the layers that serve the most.

For a number of rows, KV room bounds the layers of each stage; under these bounds the layers are dealt so that the
slowest stage is as fast as can be (optimal for times linear in layers). More rows make better batches but leave less
room, so several numbers of rows are tried and the best is then improved layer by layer.
"""

import heapq
import itertools
from collections.abc import Iterator, Sequence

from msgspec import Struct

from evener.plan.capacity import Capacity, replica_capacity
from evener.plan.problem import Problem
from evener.plan.stages import SPLITS, Group, Split, StageOption, Stages
from evener.spec.plan import Replica, Stage, intervals

RECUTS = (1.25, 1.5, 2.0, 3.0)
"""How much slower than it is a device is taken to be, in turn, when a split is reconsidered."""
REFINEMENTS = ((4.0, 0.25), (2.0, 0.5), (1.25, 0.8))
"""The same, from coarse to fine, when the best plans are refined."""
NO_HEADS = ((1e6, 1.0),)
"""Factors on (heads, columns) for a device that is to have no heads."""
WORTH_REFINING = 0.5
"""Of what the best serves: a start that serves less is not refined."""
BOTH = ((True, True),)
EACH = ((True, True), (True, False), (False, True))
"""Which parts of a device a step changes: (heads, columns)."""


class Candidate(Struct, frozen=True):
    """A replica and what it is predicted to serve."""

    replica: Replica
    capacity: Capacity
    splits: tuple[Split, ...]
    """How each stage is divided."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Device names."""
        return self.replica.devices()

    @property
    def groups(self) -> list[Group]:
        """Those of each stage."""
        return [tuple(shard.device for shard in stage.shards) for stage in self.replica.stages]


def deal_layers(
    total: int, first_ns: Sequence[float], layer_ns: Sequence[float], most: Sequence[int]
) -> list[int] | None:
    """Layers per stage, at least one and at most `most` each, so that the slowest stage is as fast as can be.

    Stage s takes first_ns[s] + n * layer_ns[s]. One by one to the stage that then takes least, which is optimal for
    linear times; on a tie to the earlier. None when the layers do not fit, or are fewer than the stages.
    """
    if sum(most) < total or min(most) < 1 or total < len(most):
        return None
    got = [1] * len(most)
    heap = [(first_ns[k] + 2 * layer_ns[k], k) for k in range(len(got)) if most[k] > 1]
    heapq.heapify(heap)
    for _ in range(total - len(got)):
        time, k = heap[0]
        got[k] += 1
        if got[k] < most[k]:
            heapq.heapreplace(heap, (time + layer_ns[k], k))
        else:
            heapq.heappop(heap)
    return got


def row_targets(problem: Problem) -> list[int]:
    """Numbers of rows that are planned for: from the most down to one, each about 0.7 of the one before."""
    out, rows = [], problem.max_num_seqs
    while rows > 1:
        out.append(rows)
        rows = min(rows - 1, round(rows * 0.7))
    return [*out, 1]


class _Pipe:
    """Stage options in order, and what a split of the layers gives."""

    def __init__(self, problem: Problem, options: Sequence[StageOption]) -> None:
        self.problem = problem
        self.options = options
        self.delay_ns = sum(o.delay_ns for o in options)
        self.known: dict[tuple[int, ...], Capacity | None] = {}

    def capacity(self, layers: Sequence[int]) -> Capacity | None:
        """None when a stage lacks the memory for the longest request."""
        key = tuple(layers)
        if key not in self.known:
            blocks = min(o.blocks(n) for o, n in zip(self.options, layers, strict=True))
            if blocks < self.problem.least_blocks():
                self.known[key] = None
            else:
                # More than all sequences at their longest could use is no use.
                blocks = min(blocks, self.problem.max_num_seqs * self.problem.least_blocks())
                self.known[key] = replica_capacity(
                    self.problem,
                    lambda shape: [a + n * b for n, (a, b) in
                                   ((n, o.times(shape)) for o, n in zip(self.options, key, strict=True))],
                    blocks,
                    self.delay_ns,
                )  # fmt: skip
        return self.known[key]


def build_replica(
    problem: Problem, stages: Stages, groups: Sequence[Group], targets: Sequence[int] | None = None, polish: bool = True
) -> Candidate | None:
    """The replica with these groups as stages, in this order, that serves the most; None when none fits.

    Groups of several devices are split by speed, by memory (which leaves more KV room), half way between, and evenly.
    """
    splits = SPLITS if any(len(g) > 1 for g in groups) else SPLITS[:1]
    built = [_build(problem, stages, groups, targets, polish, (by,) * len(groups)) for by in splits]
    able = [c for c in built if c is not None]
    return max(able, key=lambda c: c.capacity.requests_s) if able else None


def recut(problem: Problem, stages: Stages, candidate: Candidate) -> Candidate:
    """The same groups in the same order, with one device of a stage doing less than its speed says, if that is better.

    The rule for splits looks at time alone; where memory or whole heads bound a split, another may serve more.
    """
    best = candidate
    for by in SPLITS if any(len(s.shards) > 1 for s in candidate.replica.stages) else ():
        start = tuple(by for _ in candidate.splits)
        for splits in _moves(stages, candidate, start, RECUTS, BOTH):
            best = _better(problem, stages, best, splits)
    return best


def refine(problem: Problem, stages: Stages, candidate: Candidate, known: dict[object, tuple[Split, ...]]) -> Candidate:
    """The same groups in the same order; the part of one device at a time, heads or columns, is made larger or smaller
    while that serves more.

    `known`: what was found for other replicas, which serves for all that are like them.
    """
    kinds = tuple(tuple(stages.kind[sh.device] for sh in stage.shards) for stage in candidate.replica.stages)
    links = candidate.devices if problem.cluster.links else ()
    key = (kinds, candidate.splits, links)
    if key in known:
        return _better(problem, stages, candidate, known[key])
    best = _refined(problem, stages, candidate)
    # Of a few whole heads a device may best have none; single steps, each of which has to serve more, lead not there.
    by_speed = (SPLITS[0],) * len(candidate.splits)
    for splits in _changed(stages, candidate, by_speed, NO_HEADS):
        start = _build(problem, stages, candidate.groups, None, True, splits)
        if start is not None and start.capacity.requests_s > best.capacity.requests_s * WORTH_REFINING:
            best = max(best, _refined(problem, stages, start), key=lambda c: c.capacity.requests_s)
    known[key] = best.splits
    return best


def _refined(problem: Problem, stages: Stages, best: Candidate) -> Candidate:
    """What single steps, each of which serves more, lead to."""
    for factors in REFINEMENTS:
        while True:
            before = best
            for splits in _moves(stages, best, best.splits, factors, EACH):
                best = _better(problem, stages, best, splits)
            if best is before:
                break
    return best


def _moves(
    stages: Stages, candidate: Candidate, splits: tuple[Split, ...], factors: Sequence[float],
    parts: Sequence[tuple[bool, bool]],
) -> Iterator[tuple[Split, ...]]:  # fmt: skip
    """Splits in which one device is taken to be slower by one of `factors`, for heads, for columns, or for both."""
    changes = [
        (factor if heads else 1.0, factor if columns else 1.0)
        for factor, (heads, columns) in itertools.product(factors, parts)
    ]
    return _changed(stages, candidate, splits, changes)


def _changed(
    stages: Stages, candidate: Candidate, splits: tuple[Split, ...], changes: Sequence[tuple[float, float]]
) -> Iterator[tuple[Split, ...]]:
    """Splits in which the times of one device change by one pair of factors on (heads, columns).

    Of like devices that do the same, one.
    """
    for s, stage in enumerate(candidate.replica.stages):
        n = len(stage.shards)
        paces = splits[s].pace or ((1.0, 1.0),) * n
        like = {(stages.kind[stage.shards[k].device], paces[k]): k for k in reversed(range(n))}
        unlike = sorted(like.values()) if n > 1 else []
        for k, (heads, columns) in itertools.product(unlike, changes):
            pace = list(paces)
            pace[k] = (pace[k][0] * heads, pace[k][1] * columns)
            yield (*splits[:s], splits[s]._replace(pace=tuple(pace)), *splits[s + 1 :])


def _better(problem: Problem, stages: Stages, best: Candidate, splits: tuple[Split, ...]) -> Candidate:
    got = _build(problem, stages, best.groups, None, True, splits)
    return got if got is not None and got.capacity.requests_s > best.capacity.requests_s * (1 + 1e-9) else best


def _build(
    problem: Problem, stages: Stages, groups: Sequence[Group], targets: Sequence[int] | None, polish: bool,
    splits: tuple[Split, ...],
) -> Candidate | None:  # fmt: skip
    total = problem.model.layers
    if len(groups) > total:
        return None
    options = []
    for s, group in enumerate(groups):
        onward = groups[s + 1] if s + 1 < len(groups) else ()
        option = stages.option(group, first=s == 0, last=s == len(groups) - 1, onward=onward, by=splits[s])
        if option is None:
            return None
        options.append(option)
    pipe = _Pipe(problem, options)
    best: tuple[float, list[int], Capacity] | None = None
    tried: set[tuple[int, ...]] = set()
    for rows in targets if targets is not None else row_targets(problem):
        most = [min(total, o.most_layers(problem.blocks_for(rows))) for o in options]
        shape = problem.demand.settled(rows / len(groups))
        times = [o.times(shape) for o in options]
        layers = deal_layers(total, [t[0] for t in times], [t[1] for t in times], most)
        if layers is None or tuple(layers) in tried:
            continue
        tried.add(tuple(layers))
        found = pipe.capacity(layers)
        if found is not None and (best is None or found.requests_s > best[0]):
            best = (found.requests_s, layers, found)
        if len(groups) == 1:
            break
    if best is None:
        return None
    _, layers, capacity = best
    if polish and len(groups) > 1:
        layers, capacity = _polish(pipe, layers, capacity)
    parts = intervals(layers, total)
    replica = Replica(tuple(Stage(part, o.shards) for part, o in zip(parts, options, strict=True)))
    return Candidate(replica, capacity, splits)


def _polish(pipe: _Pipe, layers: list[int], capacity: Capacity) -> tuple[list[int], Capacity]:
    """Move single layers between stages while that serves more."""
    improved = True
    while improved:
        improved = False
        for a in range(len(layers)):
            for b in range(len(layers)):
                if a == b or layers[a] == 1:
                    continue
                trial = list(layers)
                trial[a] -= 1
                trial[b] += 1
                found = pipe.capacity(trial)
                if found is not None and found.requests_s > capacity.requests_s * (1 + 1e-9):
                    layers, capacity, improved = trial, found, True
    return layers, capacity
