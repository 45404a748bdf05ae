"""Counters that only grow, and what they were at any time before. Memory is bounded."""

from array import array
from bisect import bisect_right

from evener.ledger.divide import divide
from evener.units import Nanoseconds


class Series:
    """Cumulative integers up to a time that moves on, with a checkpoint now and then.

    The first `exact` counters are nanoseconds and sum to the time that passed. Between two checkpoints they are divided
    so that this stays true at every nanosecond; the others grow in proportion. Counters may be appended: they were 0.
    """

    __slots__ = ("_exact", "_keep", "_rows", "_times", "every", "mark", "start", "totals", "until")

    def __init__(self, start: Nanoseconds, exact: int, counters: int, every: Nanoseconds | None, keep: int) -> None:
        """A checkpoint at most each `every` nanoseconds (None: never), of which the last `keep` stay."""
        self.start: int = start
        self.until: int = start
        """Everything before is counted."""
        self.totals = [0] * counters
        self._exact = exact
        self.every = float("inf") if every is None else every
        self._keep = keep
        self.mark = start + self.every
        """The next checkpoint is due at this time."""
        self._times: list[int] = [start]
        self._rows: list[array[int]] = [array("q", self.totals)]

    def copy(self) -> "Series":
        """The same so far, to go on by itself."""
        twin = Series(Nanoseconds(self.start), self._exact, 0, None, self._keep)
        twin.until, twin.every, twin.mark = self.until, self.every, self.mark
        twin.totals, twin._times, twin._rows = list(self.totals), list(self._times), list(self._rows)
        return twin

    @property
    def first(self) -> int:
        """The earliest time that is still known."""
        return self._times[0]

    def checkpoint(self) -> None:
        """Keep what is counted up to `until`. Two at one time are one."""
        if self.every == float("inf"):
            return
        if self.until > self._times[-1]:
            self._times.append(self.until)
            self._rows.append(array("q", self.totals))
            if len(self._times) > self._keep + self._keep // 4 + 1:  # dropping a few at once is cheaper than one each
                del self._times[: -self._keep], self._rows[: -self._keep]
        else:
            self._rows[-1] = array("q", self.totals)
        self.mark = self.until + self.every

    def at(self, when: int) -> list[int]:
        """The counters at a time in [first, until], or at the start."""
        if when == self.start:
            return [0] * len(self.totals)
        assert self.first <= when <= self.until, f"{when} is not in [{self.first}, {self.until}]"
        k = bisect_right(self._times, when) - 1
        low, began = list(self._rows[k]), self._times[k]
        low += [0] * (len(self.totals) - len(low))
        if when == began:
            return low
        if k + 1 < len(self._times):
            high, ended = list(self._rows[k + 1]), self._times[k + 1]
        else:
            high, ended = self.totals, self.until
        grown = [b - a for a, b in zip(low, high, strict=False)] + [0] * (len(low) - len(high))
        exact = self._exact
        parts = divide(when - began, grown[:exact]) if exact else []
        parts += [g * (when - began) // (ended - began) for g in grown[exact:]]
        return [a + b for a, b in zip(low, parts, strict=True)]

    def between(self, since: int, until: int) -> list[int]:
        """How much the counters grew in a window inside [first, until]."""
        return [b - a for a, b in zip(self.at(since), self.at(until), strict=True)]
