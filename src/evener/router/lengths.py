"""How many more tokens a request will output, learned online.

A life table (Kaplan and Meier, J. Am. Stat. Assoc. 53, 1958) over log-spaced buckets of output length: of the requests
that reach a bucket, which share ends inside it. A request that leaves before its end (at its cap, cancelled, or still
running: *censored*) counts for the part of the bucket that it was seen to survive, so that it biases nothing, while
the mean of the finished ones would be too short. Inside a bucket the chance to end is the same at every token. A
bucket that few requests reached leans on the memoryless hypothesis with the mean seen so far, and that on a mean of
`PRIOR_MEAN`.
"""

from bisect import bisect_right
from itertools import pairwise
from math import exp, expm1, log, log1p

from msgspec import Struct

PRIOR_MEAN = 256
"""Expected output tokens before anything was seen."""
_SHRINK = 1.0
"""Requests that the memoryless hypothesis counts for in every bucket."""
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

    Updates cost O(buckets). A query costs a binary search, and O(buckets) once after updates.
    """

    def __init__(self, state: LengthState | None = None, memory: float = 4096.0) -> None:
        """`memory`: ends after which an observation has lost most (1 - 1/e) of its weight."""
        state = state or LengthState()
        self._ends = list(state.ends)
        self._survived = list(state.survived)
        self._tokens = state.tokens
        self._keep = 1.0 - 1.0 / memory
        self._stale = True
        self._log_stay: list[float] = []
        """Per bucket, and beyond the last: log P(one more token)."""
        self._remaining: list[float] = []
        """Per edge: expected further tokens without a cap."""
        self._log_survival: list[float] = []

    def state(self) -> LengthState:
        """What was learned so far."""
        return LengthState(tuple(self._ends), tuple(self._survived), self._tokens)

    def observe(self, length: int, censored: bool) -> None:
        """A request left after `length` output tokens; `censored`: it would have gone on (cap, cancelled, failed)."""
        self.advance(0, length)
        if not censored:
            self.end(length)

    def advance(self, start: int, stop: int) -> None:
        """A request went from `start` to `stop` output tokens and did not end on the way.

        Called as requests run (and then `end` instead of `observe`), it learns from those still running too.
        """
        self._stale = True
        self._tokens += max(0, stop - start)
        k = bisect_right(EDGES, start) - 1
        while start < stop and k < len(_WIDTHS):
            upto = min(stop, EDGES[k + 1])
            self._survived[k] += (upto - start) / _WIDTHS[k]
            start, k = upto, k + 1

    def end(self, length: int) -> None:
        """A request that was followed up to `length` output tokens ended by itself; older ones fade a little."""
        self._stale = True
        k = min(bisect_right(EDGES, length), len(_WIDTHS)) - 1
        part = min(1.0, (length - EDGES[k]) / _WIDTHS[k])
        # It was at risk once in this bucket, as an end and not also as a part that survived.
        self._survived[k] = max(0.0, self._survived[k] - part)
        self._ends[k] += 1.0
        self._ends = [x * self._keep for x in self._ends]
        self._survived = [x * self._keep for x in self._survived]
        self._tokens *= self._keep

    def expected_remaining(self, so_far: int, cap: int) -> float:
        """Expected further output tokens of a request that has `so_far` and may have `cap`; in [0, cap - so_far]."""
        if so_far >= cap:
            return 0.0
        if self._stale:
            self._refresh()
        # E[min(L, cap) - n] = E[L - n] - P(reach cap) E[L - cap | reached cap]
        log_reach = self._log_survival_at(cap) - self._log_survival_at(so_far)
        left = self._remaining_at(so_far) - exp(min(0.0, log_reach)) * self._remaining_at(cap)
        return min(max(left, 0.0), float(cap - so_far))

    def _refresh(self) -> None:
        ends = sum(self._ends)
        pooled = log1p(-(1.0 + ends) / (1.0 + ends + PRIOR_MEAN + self._tokens))
        self._log_stay = []
        for end, survived, width in zip(self._ends, self._survived, _WIDTHS, strict=True):
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
        self._stale = False

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
