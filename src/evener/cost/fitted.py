"""A cost model corrected by what live batches took. Pure; `evener.profile.refit` finds the factors.

Operations fall into classes, and each class of each device has a factor on what the base model says:

    rows      projections, FFN, embedding and the worker's own time, by the number of rows: a factor at every knot,
              linear between them
    prefill   attention of prefill, by (query, key) pairs
    decode    attention of decode, by keys
    head      logits and sampling, by sampled rows
    chunk     what every prefill chunk takes

All-reduces and sends get a line by size instead (time per operation, time per byte), the host of devices that wait for
it a time per batch and one per change, and ranks that are late in turns a part of what the slowest computes. Where no
batch says anything about a class, its factor stays near the others'.
"""

from collections.abc import Mapping

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from evener.cost.base import BatchShape
from evener.cost.device import DeviceCosts
from evener.cost.rates import Collective, Floats, Profile
from evener.cost.roofline import RooflineCostModel
from evener.cost.stage import OwnTimes

KNOTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
"""Rows at which the factor of `rows` is free."""
CLASSES = ("prefill", "decode", "head", "chunk")
TERMS = len(KNOTS) + len(CLASSES)
LEAST_FACTOR = 1e-3


class Factors(Struct, frozen=True):
    """How many times as long as the base model says; 1 leaves it as it is."""

    rows: tuple[float, ...] = (1.0,) * len(KNOTS)
    """At KNOTS."""
    prefill: float = 1.0
    decode: float = 1.0
    head: float = 1.0
    chunk: float = 1.0

    @classmethod
    def of(cls, values: Floats) -> "Factors":
        """From a vector of TERMS values in the order of `features`."""
        each = [max(LEAST_FACTOR, float(v)) for v in values]  # nothing that is done takes no time
        return cls(tuple(each[: len(KNOTS)]), *each[len(KNOTS) :])

    def by_rows(self, rows: NDArray[np.int64]) -> Floats:
        """The factor at so many rows; constant below the first knot and past the last."""
        out: Floats = np.interp(rows.astype(np.float64), KNOTS, self.rows)
        return out


class Observation(Struct, frozen=True):
    """What one shard did for one batch, or for `repeat` consecutive decode steps."""

    replica: int
    stage: int
    rank: int
    shape: BatchShape
    compute_ns: int
    """Without waiting, and without time in which others had the core."""
    repeat: int = 1


class HostObservation(Struct, frozen=True):
    """Control time of one batch that a device waited for."""

    ns: int
    changes: int
    """Rows that came, went or were sampled."""


def features(own: OwnTimes, shape: BatchShape, repeat: int = 1) -> list[float]:
    """What the base model says of each class, nanoseconds; their sum is the shard's predicted compute."""
    rows = shape.tokens
    last = len(own.by_rows) - 1
    alike = own.by_rows[min(rows, last)] + own.attention[min(rows, last)]
    if rows > last:
        alike = alike * rows // last
    sampled = own.by_sampled[min(shape.sampled_rows, last)]
    keys = repeat * shape.decode_context + shape.decode_rows * (repeat * (repeat - 1) // 2)
    out = [0.0] * len(KNOTS)
    k = int(np.searchsorted(KNOTS, rows, side="right"))
    if k == 0 or k == len(KNOTS):
        out[max(0, k - 1)] = float(alike * repeat)
    else:
        share = (rows - KNOTS[k - 1]) / (KNOTS[k] - KNOTS[k - 1])
        out[k - 1], out[k] = alike * repeat * (1 - share), alike * repeat * share
    rest = (own.pair_ns * shape.prefill_pairs, own.key_ns * keys, float(sampled), float(own.chunk_ns * shape.chunks))
    # A worker that shares its core waits for it; what it computes takes its own share of the predicted time.
    return [x * (1.0 - own.lost) for x in (*out, rest[0] * repeat, rest[1], rest[2] * repeat, rest[3] * repeat)]


class CorrectedCosts(DeviceCosts):
    """Another model of the device's times, with factors."""

    def __init__(self, inner: DeviceCosts, factors: Factors) -> None:
        self.__dict__.update(inner.__dict__)
        self._inner, self._factors = inner, factors
        # Chunks start operators; the other classes ask the inner model.
        self.rates = structs.replace(inner.rates, op_ns=max(inner.rates.op_ns * factors.chunk, 1e-9))

    def attention_rows(self, rows: NDArray[np.int64], heads: int, kv_heads: int) -> Floats:
        """See DeviceCosts."""
        out: Floats = self._inner.attention_rows(rows, heads, kv_heads) * self._factors.by_rows(rows)
        return out

    def pair_ns(self, heads: int) -> float:
        """See DeviceCosts."""
        return self._inner.pair_ns(heads) * self._factors.prefill

    def key_ns(self, heads: int, kv_heads: int) -> float:
        """See DeviceCosts."""
        return self._inner.key_ns(heads, kv_heads) * self._factors.decode

    def step_rows(self, rows: NDArray[np.int64]) -> Floats:
        """See DeviceCosts."""
        out: Floats = self._inner.step_rows(rows) * self._factors.by_rows(rows)
        return out

    def ffn_rows(self, rows: NDArray[np.int64], columns: int) -> Floats:
        """See DeviceCosts."""
        out: Floats = self._inner.ffn_rows(rows, columns) * self._factors.by_rows(rows)
        return out

    def embed_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """See DeviceCosts."""
        out: Floats = self._inner.embed_rows(rows, vocabulary) * self._factors.by_rows(rows)
        return out

    def head_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """See DeviceCosts."""
        out: Floats = self._inner.head_rows(rows, vocabulary) * self._factors.head
        return out


class Corrections(Struct, frozen=True):
    """All that a fit found."""

    devices: Mapping[str, Factors]
    collectives: tuple[Collective, ...] = ()
    """These replace the base model's for as many ranks."""
    host_ns: int | None = None
    """Per batch, of devices without `Rates.step_ns`; None: as the base model says."""
    uneven: float | None = None
    """As in Profile; None: as the base model says."""
    error: float = 0.0
    """Median relative error of a shard's compute time, on batches that the fit did not see."""
    base_error: float = 0.0
    """The base model's on the same batches."""
    batches: int = 0


def corrected(base: RooflineCostModel, corrections: Corrections, version: int) -> RooflineCostModel:
    """The base model with corrections; its `error()` is that of the fit. Immutable, as every cost model."""
    assert version > base.version, f"version {version} must be above the base model's {base.version}"
    fitted = {c.ranks for c in corrections.collectives}

    def profile(given: Profile) -> Profile:
        kept = tuple(c for c in given.collectives if c.ranks not in fitted)
        host = given.host_ns if corrections.host_ns is None else corrections.host_ns
        uneven = given.uneven if corrections.uneven is None else corrections.uneven
        return structs.replace(given, collectives=corrections.collectives + kept, host_ns=host, uneven=uneven)

    return base.changed(
        version,
        lambda device, costs: CorrectedCosts(costs, corrections.devices.get(device.name, Factors())),
        measured_error=corrections.error,
        profile=profile,
    )
