"""Feeds the ledger of a live run. Serving is worth more than knowing: a ledger that fails is left alone."""

import sys
import traceback
from collections.abc import Callable
from typing import Any

from evener.errors import Unavailable
from evener.ledger.ledger import Ledger
from evener.ledger.spans import HoldKind, MakeUp, Milestone, Span
from evener.units import Nanoseconds


class LedgerFeed:
    """A `Journal` that passes everything on to one ledger until that raises."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.failure = ""
        """What the ledger failed of, if it did."""

    def read(self, now: Nanoseconds) -> Ledger:
        """The ledger, settled up to `now`. Raises Unavailable when it has failed."""
        self._tell(self._ledger.settle, now)
        if self.failure:
            raise Unavailable(f"the ledger stopped: {self.failure}; restart the server to account again")
        return self._ledger

    def span(self, span: Span) -> None:
        """A worker reports a batch."""
        self._tell(self._ledger.span, span)

    def up(self, replica: int, now: Nanoseconds) -> None:
        """All workers of a replica have loaded."""
        self._tell(self._ledger.up, replica, now)

    def issued(self, replica: int, batch_id: int, now: Nanoseconds, made_of: MakeUp) -> None:
        """See Journal."""
        self._tell(self._ledger.issued, replica, batch_id, now, made_of)

    def done(self, replica: int, batch_id: int, now: Nanoseconds, late_rows: int) -> None:
        """See Journal."""
        self._tell(self._ledger.done, replica, batch_id, now, late_rows)

    def state(self, replica: int, now: Nanoseconds, hold: HoldKind, unfinished: bool, short_of_kv: bool) -> None:
        """See Journal."""
        self._tell(self._ledger.state, replica, now, hold, unfinished, short_of_kv)

    def waiting(self, now: Nanoseconds, anybody: bool) -> None:
        """See Journal."""
        self._tell(self._ledger.waiting, now, anybody)

    def down(self, replica: int, now: Nanoseconds, reason: str) -> None:
        """See Journal."""
        self._tell(self._ledger.down, replica, now, reason)

    def request(self, request_id: str, replica: int, now: Nanoseconds, what: Milestone, tokens: int) -> None:
        """See Journal."""
        self._tell(self._ledger.request, request_id, replica, now, what, tokens)

    def _tell(self, method: Callable[..., None], *args: Any) -> None:
        if self.failure:
            return
        try:
            method(*args)
        except Exception as error:  # whatever it is, requests go on
            self.failure = f"{type(error).__name__}: {error}"
            traceback.print_exc()
            print(f"evener: the ledger stopped ({self.failure}); requests are served on", file=sys.stderr, flush=True)
