"""Figures of a simulation, taken as requests end: memory does not grow with the traffic."""

import math
from array import array
from collections import Counter

from msgspec import Struct

from evener.execute.sim.traffic import Outcome
from evener.units import NS_PER_S

KEEP = 20_000
"""Values that a distribution keeps as they are."""
RELATIVE_ERROR = 0.005
"""Of a percentile of more values than that."""
_WIDTH = math.log1p(2 * RELATIVE_ERROR)


class Percentiles(Struct, frozen=True):
    """None where there was nothing to measure. `mean` and `max` are exact."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None
    mean: float | None = None
    max: float | None = None


class Distribution:
    """Non-negative values, in bounded memory.

    Percentiles are exact (interpolated linearly) for up to KEEP values. For more, values are counted in buckets whose
    bounds grow geometrically, and a percentile is off by RELATIVE_ERROR at most (Masson, Rim and Lee, "DDSketch",
    VLDB 2019).
    """

    def __init__(self) -> None:
        self.count = 0
        self.total = 0.0
        self.largest = 0.0
        self._values: array[float] | None = array("d")
        self._buckets: Counter[int] = Counter()

    def add(self, value: float) -> None:
        """One more value."""
        self.count += 1
        self.total += value
        if value > self.largest:
            self.largest = value
        if self._values is None:
            self._buckets[_bucket(value)] += 1
            return
        self._values.append(value)
        if len(self._values) > KEEP:
            self._buckets.update(map(_bucket, self._values))
            self._values = None

    def quantile(self, q: float) -> float | None:
        """The value that a share `q` of all values does not exceed; None without values."""
        if not self.count:
            return None
        at = q * (self.count - 1)
        if self._values is not None:
            ordered = sorted(self._values)
            low = int(at)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (ordered[high] - ordered[low]) * (at - low)
        seen = 0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen > at:
                return min(self.largest, math.exp((bucket + 0.5) * _WIDTH)) if bucket > _ZERO else 0.0
        return self.largest

    def summary(self, scale: float = 1.0) -> Percentiles:
        """Percentiles, mean and largest, times `scale`."""
        if not self.count:
            return Percentiles()
        p50, p90, p99 = (scale * (self.quantile(q) or 0.0) for q in (0.5, 0.9, 0.99))
        return Percentiles(p50, p90, p99, scale * self.total / self.count, scale * self.largest)


_ZERO = -(1 << 40)


def _bucket(value: float) -> int:
    return math.floor(math.log(value) / _WIDTH) if value > 0 else _ZERO


class SimReport(Struct, frozen=True, kw_only=True):
    """How requests were served, by the definitions of `evener bench`. Milliseconds unless named otherwise."""

    requests: int
    completed: int
    failures: dict[str, int]
    """Reason -> requests."""
    duration_s: float
    """From the first arrival to the last end."""
    input_tokens: int
    output_tokens: int
    output_tok_s: float
    total_tok_s: float
    completed_req_s: float
    ttft_ms: Percentiles
    tpot_ms: Percentiles
    e2e_ms: Percentiles
    goodput_req_s: float
    """Completed requests per second that meet every bound (all, without bounds)."""
    met: float
    """Share of all requests that met every bound."""


class Figures:
    """Pass it to the simulator as `on_end`."""

    def __init__(self, ttft_ns: float | None = None, tpot_ns: float | None = None, e2e_ns: float | None = None) -> None:
        """Bounds of goodput in nanoseconds; None is no bound. An answer of one token meets any bound on TPOT."""
        self.ttft, self.tpot, self.e2e = Distribution(), Distribution(), Distribution()
        self.requests = self.completed = self.good = 0
        self.input_tokens = self.output_tokens = 0
        self.failures: Counter[str] = Counter()
        self._bounds = (ttft_ns, tpot_ns, e2e_ns)
        self._first: int | None = None
        self._last = 0

    def __call__(self, outcome: Outcome) -> None:
        """A request ended."""
        self.requests += 1
        arrival, ended, first = outcome.arrival, outcome.ended, outcome.first_token
        assert ended is not None
        if self._first is None or arrival < self._first:
            self._first = arrival
        self._last = max(self._last, ended)
        if outcome.finish not in ("stop", "length"):
            self.failures[outcome.finish] += 1
            return
        self.completed += 1
        self.input_tokens += outcome.prompt_len
        self.output_tokens += outcome.tokens
        if first is None:  # an answer without a token
            first = ended
        ttft, e2e = first - arrival, ended - arrival
        self.ttft.add(ttft)
        self.e2e.add(e2e)
        tpot = 0.0
        if outcome.tokens > 1:
            tpot = (ended - first) / (outcome.tokens - 1)
            self.tpot.add(tpot)
        most_ttft, most_tpot, most_e2e = self._bounds
        self.good += (
            (most_ttft is None or ttft <= most_ttft)
            and (most_tpot is None or tpot <= most_tpot)
            and (most_e2e is None or e2e <= most_e2e)
        )

    def report(self) -> SimReport:
        """The figures so far."""
        seconds = (self._last - (self._first or 0)) / NS_PER_S
        per_s = 1 / seconds if seconds > 0 else 0.0
        return SimReport(
            requests=self.requests,
            completed=self.completed,
            failures=dict(self.failures),
            duration_s=seconds,
            input_tokens=self.input_tokens,
            output_tokens=self.output_tokens,
            output_tok_s=self.output_tokens * per_s,
            total_tok_s=(self.input_tokens + self.output_tokens) * per_s,
            completed_req_s=self.completed * per_s,
            ttft_ms=self.ttft.summary(1e-6),
            tpot_ms=self.tpot.summary(1e-6),
            e2e_ms=self.e2e.summary(1e-6),
            goodput_req_s=self.good * per_s,
            met=self.good / self.requests if self.requests else 0.0,
        )
