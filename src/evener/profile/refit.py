"""Fits the cost model to live spans: non-negative least squares by operation class (`evener.cost.fitted`).

    refit = Refit(base)            hears what a ledger hears: issued batches and spans
    refit.issued(...), .span(...)
    better = refit.fit(version)    a new, immutable cost model with its held-out error

It can follow a run that goes on: `due` says when enough batches came since the last fit. Memory is bounded then: of
every shard the newest observations are kept, so a model follows a machine that changes.
"""

from collections import deque
from collections.abc import Sequence
from statistics import median

import numpy as np

from evener.cost.fitted import (
    CLASSES,
    KNOTS,
    TERMS,
    Corrections,
    Factors,
    HostObservation,
    Observation,
    corrected,
    features,
)
from evener.cost.rates import Collective, Floats
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidInput
from evener.ledger.spans import MakeUp, Op, Span
from evener.profile.fit import nonnegative_fit

LEAST = 48
"""Spans of every shard that a fit needs."""
HELD_OUT = 4
"""Every so many-th span is kept from the fit, to tell its error."""
PULL = 0.02
"""How strongly a factor that the spans say little about stays near the common one (see `nonnegative_fit`)."""
KEPT = 4096
"""Spans kept per shard of a run that goes on."""
COLLECTIVE_SIZES = (1024, 1 << 20)
_REDUCE = (int(Op.ALL_REDUCE),)
_SEND = (int(Op.SEND), int(Op.RECV))


class Refit:
    """Collects what batches were made of and what they took, and fits."""

    def __init__(self, base: RooflineCostModel, every: int = 2000, kept: int | None = KEPT) -> None:
        """`every`: batches between two fits, for `due`. `kept`: newest spans of a shard; None: all of them."""
        self.base = base
        self._every = every
        self._kept = kept
        self._since = 0
        self._made_of: dict[tuple[int, int], MakeUp] = {}
        self._seen: dict[tuple[int, int, int], deque[Observation]] = {}
        self._moves: dict[int, deque[tuple[int, int, int]]] = {}
        """Ranks -> (operations, bytes, nanoseconds); a send counts as two ranks."""
        self._hosts: deque[HostObservation] = deque(maxlen=kept)
        self._open: dict[tuple[int, int, int], list[Span]] = {}
        """Stage of a batch -> what its ranks did, until all have told."""
        self._turns: deque[tuple[int, int]] = deque(maxlen=kept)
        """What every rank waited for others at least, and what the slowest computed."""

    def issued(self, replica: int, batch_id: int, made_of: MakeUp) -> None:
        """A batch was handed over. Call it before its spans."""
        self._made_of[replica, batch_id] = made_of
        for stage in range(len(self.base.plan.replicas[replica].stages)):
            self._open.pop((replica, stage, batch_id), None)  # of an earlier run, which ended within it
        if len(self._made_of) > KEPT:
            del self._made_of[next(iter(self._made_of))]

    def span(self, span: Span) -> None:
        """What a device did. A span of a batch that was never issued here, or long ago, says nothing and is left."""
        made_of = self._made_of.get((span.replica, span.batch_id))
        if made_of is None or made_of.shape.tokens == 0 or span.compute <= 0:
            return
        at = span.replica, span.stage, span.rank
        seen = self._seen.setdefault(at, deque(maxlen=self._kept))
        seen.append(Observation(*at, made_of.shape, span.compute, span.repeat))
        ranks = len(self.base.plan.replicas[span.replica].stages[span.stage].shards)
        if ranks > 1:
            self._wait(span, ranks)
        for part in span.traffic:
            size = ranks if part.op in _REDUCE else 2 if part.op in _SEND else 0
            if size > 1 and part.count and part.moving > 0:
                self._moves.setdefault(size, deque(maxlen=self._kept)).append((part.count, part.nbytes, part.moving))
        self._since += span.rank == 0 and span.stage == 0

    def _wait(self, span: Span, ranks: int) -> None:
        """Where even the rank that waited the least has waited, all were late in turns."""
        at = span.replica, span.stage, span.batch_id
        told = self._open.setdefault(at, [])
        told.append(span)
        if len(told) == ranks:
            del self._open[at]
            self._turns.append((min(s.straggler for s in told), max(s.compute for s in told)))
        elif len(self._open) > KEPT:
            del self._open[next(iter(self._open))]

    def host(self, ns: int, changes: int) -> None:
        """Control time of a batch, and how many rows it changed or sampled."""
        self._hosts.append(HostObservation(ns, changes))

    @property
    def due(self) -> bool:
        """So many batches came since the last fit, and there are enough for another."""
        return self._since >= self._every and not self._lacking()

    def fit(self, version: int) -> RooflineCostModel:
        """A new cost model. Raises InvalidInput that names the shard with too few spans."""
        return corrected(self.base, self.corrections(), version)

    def corrections(self) -> Corrections:
        """What the spans say. Raises InvalidInput that names the shard with too few of them."""
        lacking = self._lacking()
        if lacking:
            raise InvalidInput(f"{lacking}; serve more traffic, or keep the cost model as it is")
        self._since = 0
        devices, errors, base_errors = {}, list[float](), list[float]()
        for (r, s, k), seen in sorted(self._seen.items()):
            factors, off, base_off = self._shard(r, s, k, list(seen))
            devices[self.base.plan.replicas[r].stages[s].shards[k].device] = factors
            errors += off
            base_errors += base_off
        return Corrections(
            devices, self._collectives(), self._host_ns(), self._uneven(), median(errors), median(base_errors),
            sum(len(seen) for seen in self._seen.values()),
        )  # fmt: skip

    def _lacking(self) -> str:
        for r, replica in enumerate(self.base.plan.replicas):
            for s, stage in enumerate(replica.stages):
                for k, shard in enumerate(stage.shards):
                    have = len(self._seen.get((r, s, k), ()))
                    if have < LEAST:
                        return f"a fit needs {LEAST} spans of {shard.device} (replica {r}, stage {s}), there are {have}"
        return ""

    def _shard(self, r: int, s: int, k: int, seen: Sequence[Observation]) -> tuple[Factors, list[float], list[float]]:
        """The factors of one shard, and the relative errors of fit and base model on spans that the fit did not see."""
        own = self.base.own_times(r, s, k)
        table = np.array([features(own, o.shape, o.repeat) for o in seen])
        took = np.array([o.compute_ns for o in seen], dtype=np.float64)
        held = np.arange(len(seen)) % HELD_OUT == HELD_OUT - 1
        said = table.sum(axis=1)
        usual = float(np.median(took[~held] / np.maximum(said[~held], 1.0)))
        prior = np.full(TERMS, usual)
        found = _robust(table[~held], took[~held], prior)
        error = np.abs(table[held] @ found - took[held]) / took[held]
        base_error = np.abs(said[held] - took[held]) / took[held]
        return Factors.of(found), error.tolist(), base_error.tolist()

    def _collectives(self) -> tuple[Collective, ...]:
        """A line by size for every number of ranks that moved data often enough."""
        out = []
        for ranks, moves in sorted(self._moves.items()):
            if len(moves) < LEAST:
                continue
            each = np.array(moves, dtype=np.float64)
            # The base model's line, as many times as long as these moves took: for sizes that never came.
            sizes = np.array(COLLECTIVE_SIZES, dtype=np.float64)
            small, large = self.base.profile.collective_ns(ranks, sizes)
            slope = (large - small) / (sizes[1] - sizes[0])
            guess = np.maximum([small - slope * sizes[0], slope], [1.0, 1e-6])
            usual = float(np.median(each[:, 2] / (each[:, :2] @ guess)))
            line = _robust(each[:, :2], each[:, 2], guess * usual)
            points = tuple((size, float(max(1.0, line[0] + line[1] * size))) for size in COLLECTIVE_SIZES)
            out.append(Collective("fitted", ranks, points))
        return tuple(out)

    def _uneven(self) -> float | None:
        """In total, as throughput is made of totals."""
        if len(self._turns) < LEAST:
            return None
        return sum(waited for waited, _ in self._turns) / sum(computed for _, computed in self._turns)

    def _host_ns(self) -> int | None:
        """A time per batch and one per change, at the usual number of changes."""
        if len(self._hosts) < LEAST:
            return None
        changes = np.array([h.changes for h in self._hosts], dtype=np.float64)
        took = np.maximum([h.ns for h in self._hosts], 1).astype(np.float64)
        line = nonnegative_fit(np.stack([np.ones(len(took)), changes], axis=1), took).factors
        return round(float(line[0] + line[1] * np.median(changes)))


def _robust(table: Floats, took: Floats, prior: Floats) -> Floats:
    """Factors from all points but the far outliers: a page fault or an interrupt is no property of the operation.

    All points together take what they took: a fit of relative errors leans to the fast ones, where a device has several
    speeds, and throughput is made of totals.
    """
    first = nonnegative_fit(table, took, prior, PULL)
    off = np.abs(table @ first.factors - took) / took
    kept = off <= max(0.1, 5 * float(np.median(off)))
    found = nonnegative_fit(table[kept], took[kept], prior, PULL).factors
    scaled: Floats = found * (took.sum() / (table @ found).sum())
    return scaled


def describe(corrections: Corrections) -> list[str]:
    """For people: one line per device, and the error."""
    lines = []
    for name, f in corrections.devices.items():
        rows = " ".join(f"{k}:{x:.2f}" for k, x in zip(KNOTS, f.rows, strict=True))
        rest = " ".join(f"{c}:{getattr(f, c):.2f}" for c in CLASSES)
        lines.append(f"{name}: rows {rows} {rest}")
    if corrections.uneven:
        lines.append(f"ranks late in turns: {corrections.uneven:.1%} of what the slowest computes")
    lines.append(
        f"held-out error {corrections.error:.1%} (before: {corrections.base_error:.1%}), {corrections.batches} spans"
    )
    return lines
