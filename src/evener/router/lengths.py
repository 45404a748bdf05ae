"""How many more tokens a request will output, learned online.

After n output tokens a request ends with probability h(n), its *hazard*, or outputs one more. Hazards are learned in
log-spaced buckets as ends over trials, the idea of Kaplan and Meier (J. Am. Stat. Assoc. 53, 1958): every token
survived is a trial, whatever happens later. So requests that reach their cap, are cancelled or still run (*censored*)
bias nothing, while the mean of the finished ones would be too short. A bucket with few trials leans on the
memoryless hypothesis with the mean seen so far, and that on a mean of `PRIOR_MEAN` tokens.
"""

from bisect import bisect_right
from itertools import pairwise
from math import exp, expm1, inf, log1p

from msgspec import Struct

PRIOR_MEAN = 256
"""Expected output tokens before anything was seen."""
_SHRINK = 16.0
"""Trials that the pooled hazard counts for in every bucket."""


def _edges() -> tuple[int, ...]:
    """0, 1, ..., 16, then four buckets per octave up to 2**20; the last bucket has no end."""
    fine = list(range(17))
    return tuple(fine + sorted({round(2 ** (k / 4)) for k in range(17, 81)}))


EDGES = _edges()
"""Bucket k holds output lengths [EDGES[k], EDGES[k + 1])."""


class LengthState(Struct, frozen=True):
    """What an estimator has learned, one entry per bucket; save it and start from it."""

    trials: tuple[float, ...] = (0.0,) * len(EDGES)
    ends: tuple[float, ...] = (0.0,) * len(EDGES)


class LengthEstimator:
    """Expected remaining output tokens, given the tokens so far and the cap. Deterministic; no clock.

    Updates cost O(buckets). A query costs a binary search, and O(buckets) once after updates.
    """

    def __init__(self, state: LengthState | None = None, memory: float = 4096.0) -> None:
        """`memory`: finished requests after which an observation has lost most (1 - 1/e) of its weight."""
        state = state or LengthState()
        self._trials = list(state.trials)
        self._ends = list(state.ends)
        self._keep = 1.0 - 1.0 / memory
        self._stale = True
        self._hazard: list[float] = []
        self._remaining: list[float] = []
        self._log_survival: list[float] = []

    def state(self) -> LengthState:
        """What was learned so far."""
        return LengthState(tuple(self._trials), tuple(self._ends))

    def observe(self, length: int, censored: bool) -> None:
        """A request left after `length` output tokens; `censored`: it would have gone on (cap, cancelled, failed)."""
        self.advance(0, length)
        if not censored:
            self.end(length)

    def advance(self, start: int, stop: int) -> None:
        """A request went from `start` to `stop` output tokens and did not end on the way.

        Called as requests run (and then `end` instead of `observe`), it learns from those still running too.
        """
        k = bisect_right(EDGES, start) - 1
        while start < stop:
            upto = min(stop, EDGES[k + 1]) if k + 1 < len(EDGES) else stop
            self._trials[k] += upto - start
            start, k = upto, k + 1
        self._stale = True

    def end(self, length: int) -> None:
        """A request ended by itself after `length` output tokens; older observations fade a little."""
        k = bisect_right(EDGES, length) - 1
        self._trials = [x * self._keep for x in self._trials]
        self._ends = [x * self._keep for x in self._ends]
        self._trials[k] += 1
        self._ends[k] += 1
        self._stale = True

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
        pooled = (1.0 + sum(self._ends)) / (1.0 + PRIOR_MEAN + sum(self._trials))
        self._hazard = [(e + _SHRINK * pooled) / (t + _SHRINK) for e, t in zip(self._ends, self._trials, strict=True)]
        widths = [b - a for a, b in pairwise(EDGES)]
        self._log_survival = [0.0]
        for width, h in zip(widths, self._hazard, strict=False):
            self._log_survival.append(self._log_survival[-1] + width * log1p(-h))
        last = self._hazard[-1]
        remaining = [(1 - last) / last]
        for width, h in zip(reversed(widths), reversed(self._hazard[:-1]), strict=True):
            remaining.append(_geometric(h, width, remaining[-1]))
        self._remaining = remaining[::-1]
        self._stale = False

    def _remaining_at(self, n: int) -> float:
        """Expected further tokens without a cap."""
        k = bisect_right(EDGES, n) - 1
        if k + 1 == len(EDGES):
            return self._remaining[k]
        return _geometric(self._hazard[k], EDGES[k + 1] - n, self._remaining[k + 1])

    def _log_survival_at(self, n: int) -> float:
        """log P(output length >= n)."""
        k = bisect_right(EDGES, n) - 1
        return self._log_survival[k] + (n - EDGES[k]) * log1p(-self._hazard[k])


def _geometric(hazard: float, width: int, after: float) -> float:
    """Expected tokens over `width` trials of one hazard in (0, 1), and `after` more if all are survived."""
    log_all = width * log1p(-hazard) if hazard < 1 else -inf
    return -(1 - hazard) / hazard * expm1(log_all) + exp(log_all) * after
