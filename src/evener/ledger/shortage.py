"""How long a replica was short of KV blocks, and who waited meanwhile."""

from evener.ledger.series import Series
from evener.units import Nanoseconds


class Shortage:
    """Counts as time goes on; `series` has nanoseconds in which a request waited for blocks, and in these, waiting
    tokens and waiting requests times microseconds."""

    def __init__(self, start: Nanoseconds, every: Nanoseconds | None, keep: int) -> None:
        self.series = Series(start, 0, 3, every, keep)
        self._short = False
        self._tokens = self._requests = 0

    def changes(self, now: Nanoseconds, short: bool) -> None:
        """From `now` on a request waits for blocks, or none does."""
        if short != self._short:
            self._count(now)
            self._short = short

    def waits(self, now: Nanoseconds, tokens: int) -> None:
        """A request with so many tokens begins to wait; fewer than 0: it does not wait any more."""
        if self._short:
            self._count(now)
        self._tokens = max(0, self._tokens + tokens)
        self._requests = max(0, self._requests + (1 if tokens > 0 else -1))

    def ends(self, now: Nanoseconds) -> None:
        """The replica is lost: nobody waits there any more."""
        self._count(now)
        self._short = False
        self._tokens = self._requests = 0

    def count_to(self, now: Nanoseconds) -> None:
        """Bring the counters up to `now`."""
        if now > self.series.until:
            self._count(now)

    def _count(self, now: Nanoseconds) -> None:
        series = self.series
        if self._short:
            passed = now - series.until
            series.totals[0] += passed
            series.totals[1] += self._tokens * (passed // 1000)
            series.totals[2] += self._requests * (passed // 1000)
        series.until = now
        if now >= series.mark:
            series.checkpoint()
