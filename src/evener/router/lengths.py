"""How many more tokens a request will output, learned online.

A life table (Kaplan and Meier, J. Am. Stat. Assoc. 53, 1958) over log-spaced buckets of output length: of the requests
that reach a bucket, which share ends inside it. A request that leaves before its end (at its cap, cancelled, or still
running: *censored*) counts for the part of the bucket that it was seen to survive, so that it biases nothing, while
the mean of the finished ones would be too short. Inside a bucket the chance to end is the same at every token. A
bucket that few requests reached leans on the memoryless hypothesis with the mean seen so far, and that on a mean of
`PRIOR_MEAN`.
"""

from bisect import bisect_right
from collections.abc import Iterable
from itertools import accumulate, pairwise
from math import exp, expm1, log, log1p

from msgspec import Struct

PRIOR_MEAN = 256
"""Expected output tokens before anything was seen."""
_SHRINK = 1.0
"""Requests that the memoryless hypothesis counts for in every bucket."""
_LAG = 16
"""What was learned is used once it is more than a 16th of all, or 64 lessons: between, a query is two look-ups."""
_MOST_LAG = 64
_LEAST = -700.0
"""Least log of a probability: one that exp does not round to 0."""


def _edges() -> tuple[int, ...]:
    """0, 1, ..., 16, then eight buckets per octave up to 2**18; what is longer is memoryless."""
    return (*range(17), *sorted({round(2 ** (k / 8)) for k in range(33, 145)}))


EDGES = _edges()
"""Bucket k holds output lengths [EDGES[k], EDGES[k + 1])."""
_WIDTHS = tuple(b - a for a, b in pairwise(EDGES))


class LengthState(Struct, frozen=True):
    """What an estimator has learned; save it and start from it."""

    ends: tuple[float, ...] = (0.0,) * len(_WIDTHS)
    """Requests that ended in each bucket."""
    survived: tuple[float, ...] = (0.0,) * len(_WIDTHS)
    """Requests that did not, each by the share of the bucket it was seen to survive."""
    tokens: float = 0.0
    """Output tokens of all requests, ended or not."""


class LengthEstimator:
    """Expected remaining output tokens, given the tokens so far and the cap. Deterministic; no clock.

    An update costs O(buckets that it passes). A query costs two look-ups, and O(buckets) once after some updates.
    """

    def __init__(self, state: LengthState | None = None, memory: float = 4096.0) -> None:
        """`memory`: ends after which an observation has lost most (1 - 1/e) of its weight."""
        self._keep = 1.0 - 1.0 / memory
        self._take(state or LengthState())
        self._lessons = -1
        """Since the tables below were made; -1: they never were."""
        self._heard = 0
        """Lessons so far."""
        self._patience = 0
        """Lessons that the tables may be behind."""
        self._known: dict[int, tuple[float, float]] = {}
        """Tokens -> (expected further ones without a cap, log P(so many))."""
        self._log_stay: list[float] = []
        """Per bucket, and beyond the last: log P(one more token)."""
        self._remaining: list[float] = []
        """Per edge: expected further tokens without a cap."""
        self._log_survival: list[float] = []

    def _take(self, state: LengthState) -> None:
        self._weight = 1.0
        """Of a new observation: it grows, which lets the older ones fade. All sums are in this unit."""
        self._ends = list(state.ends)
        self._survived = list(state.survived)
        """Parts of buckets; whole ones are in `_whole`."""
        self._whole = [0.0] * (len(_WIDTHS) + 1)
        """How many more survived the whole of this bucket than of the one before."""
        self._tokens = state.tokens

    def state(self) -> LengthState:
        """What was learned so far."""
        w = self._weight
        survived = [max(0.0, (a + b) / w) for a, b in zip(self._survived, accumulate(self._whole), strict=False)]
        return LengthState(tuple([x / w for x in self._ends]), tuple(survived), self._tokens / w)

    def observe(self, length: int, censored: bool) -> None:
        """A request left after `length` output tokens; `censored`: it would have gone on (cap, cancelled, failed)."""
        self.advance(0, length)
        if not censored:
            self.end(length)

    def advance(self, start: int, stop: int) -> None:
        """A request went from `start` to `stop` output tokens and did not end on the way.

        Called as requests run (and then `end` instead of `observe`), it learns from those still running too.
        """
        self._learned()
        if start >= stop:
            return
        weight = self._weight
        self._tokens += (stop - start) * weight
        first = bisect_right(EDGES, start) - 1
        last = bisect_right(EDGES, stop) - 1
        buckets = len(_WIDTHS)
        if first >= buckets:
            return
        if first == last:
            self._survived[first] += (stop - start) / _WIDTHS[first] * weight
            return
        self._survived[first] += (EDGES[first + 1] - start) / _WIDTHS[first] * weight
        self._whole[first + 1] += weight
        self._whole[min(last, buckets)] -= weight
        if last < buckets:
            self._survived[last] += (stop - EDGES[last]) / _WIDTHS[last] * weight

    def end(self, length: int) -> None:
        """A request that was followed up to `length` output tokens ended by itself; older ones fade a little."""
        self._learned()
        k = min(bisect_right(EDGES, length), len(_WIDTHS)) - 1
        part = min(1.0, (length - EDGES[k]) / _WIDTHS[k])
        # It was at risk once in this bucket, as an end and not also as a part that survived.
        self._survived[k] -= part * self._weight
        self._ends[k] += self._weight
        self._weight /= self._keep
        if self._weight > 1e100:
            self._take(self.state())

    def expected_remaining(self, so_far: int, cap: int) -> float:
        """Expected further output tokens of a request that has `so_far` and may have `cap`; in [0, cap - so_far]."""
        if so_far >= cap:
            return 0.0
        known = self._known
        at, end = known.get(so_far), known.get(cap)
        if at is None:
            at = known[so_far] = self._look_up(so_far)
        if end is None:
            end = known[cap] = self._look_up(cap)
        # E[min(L, cap) - n] = E[L - n] - P(reach cap) E[L - cap | reached cap]
        log_reach = end[1] - at[1]
        left = at[0] - (exp(log_reach) if log_reach < 0.0 else 1.0) * end[0]
        return min(max(left, 0.0), float(cap - so_far))

    def expected_sum(self, total: float, steps: int, rows: Iterable[tuple[int, int]]) -> float:
        """`total`, and `expected_remaining(lead + steps, cap)` of each of these (lead, cap), added one by one."""
        known = self._known
        for lead, cap in rows:
            so_far = lead + steps
            if so_far >= cap:
                continue
            at, end = known.get(so_far), known.get(cap)
            if at is None:
                at = known[so_far] = self._look_up(so_far)
            if end is None:
                end = known[cap] = self._look_up(cap)
            log_reach = end[1] - at[1]
            left = at[0] - (exp(log_reach) if log_reach < 0.0 else 1.0) * end[0]
            if left > 0.0:
                most = cap - so_far
                total += left if left < most else most
        return total

    def _learned(self) -> None:
        """The tables are behind by one lesson more; drop them when that is too much."""
        self._heard += 1
        if self._lessons >= 0:
            self._lessons += 1
            if self._lessons >= self._patience:
                self._lessons = -1
                self._known.clear()

    def _look_up(self, n: int) -> tuple[float, float]:
        if self._lessons < 0:
            self._refresh()
        return self._remaining_at(n), self._log_survival_at(n)

    def _refresh(self) -> None:
        state = self.state()
        ends = sum(state.ends)
        pooled = log1p(-(1.0 + ends) / (1.0 + ends + PRIOR_MEAN + state.tokens))
        self._lessons = 0
        self._patience = min(_MOST_LAG, self._heard // _LAG)
        self._log_stay = []
        for end, survived, width in zip(state.ends, state.survived, _WIDTHS, strict=True):
            # The share that survives the bucket, spread over its tokens.
            passes = (survived + _SHRINK * exp(width * pooled)) / (end + survived + _SHRINK)
            self._log_stay.append(max(log(passes), _LEAST) / width if passes > 0 else _LEAST / width)
        self._log_stay.append(pooled)
        self._log_survival = [0.0]
        for stay, width in zip(self._log_stay, _WIDTHS, strict=False):
            self._log_survival.append(self._log_survival[-1] + width * stay)
        self._remaining = [exp(pooled) / -expm1(pooled)]
        for stay, width in zip(reversed(self._log_stay[:-1]), reversed(_WIDTHS), strict=True):
            self._remaining.append(_onward(stay, width, self._remaining[-1]))
        self._remaining.reverse()

    def _remaining_at(self, n: int) -> float:
        """Expected further tokens without a cap."""
        k = bisect_right(EDGES, n) - 1
        if k == len(_WIDTHS):
            return self._remaining[k]
        return _onward(self._log_stay[k], EDGES[k + 1] - n, self._remaining[k + 1])

    def _log_survival_at(self, n: int) -> float:
        """log P(output length >= n)."""
        k = bisect_right(EDGES, n) - 1
        return self._log_survival[k] + (n - EDGES[k]) * self._log_stay[k]


def _onward(log_stay: float, width: int, after: float) -> float:
    """Expected tokens over `width` chances to end, one more token each with exp(log_stay), and `after` beyond them."""
    stay_all = exp(width * log_stay)
    return exp(log_stay) * (1.0 - stay_all) / -expm1(log_stay) + stay_all * after
