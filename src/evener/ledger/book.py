"""One device's book: everything up to its cursor has a cause."""

from collections import deque
from typing import NamedTuple

from evener.cost.base import BatchShape
from evener.ledger.causes import N_CAUSES, Cause
from evener.ledger.series import Series
from evener.ledger.spans import MakeUp, Span
from evener.units import Nanoseconds

# Counters beside the causes. BUSY: time with a batch in hand and not waiting for another stage; SPREAD: the sum of its
# squares over batches, in units of (1 << SPREAD_SHIFT) nanoseconds, so that 64 bits last for years.
CPU, BATCHES, SPANS, DECODE_ROWS, DECODE_STEPS, PREFILL_TOKENS, KFLOP, KBYTES, ROOF, BUSY, SPREAD = range(
    N_CAUSES, N_CAUSES + 11
)
COUNTERS = N_CAUSES + 11
SPREAD_SHIFT = 16
LINK_COUNTERS = 4
"""Per kind of operation and batch size: count, bytes, nanoseconds waited, nanoseconds moving."""

SIZE_CLASSES = ("1", "2-4", "5-16", "17-64", "65-256", "257-1024", "1025+")
"""Rows of a batch, for the bytes and seconds on links."""


def size_class(shape: BatchShape) -> int:
    """Index into SIZE_CLASSES."""
    return min(6, ((shape.tokens - 1).bit_length() + 1) // 2) if shape.tokens > 1 else 0


class BatchRecord:
    """A batch between its issue and the last device's account of it."""

    __slots__ = ("after", "done", "end", "issued", "late", "left", "made_of", "next", "pure", "shares", "todo")

    def __init__(self, issued: int, made_of: MakeUp, left: int, todo: int) -> None:
        self.issued = issued
        self.made_of = made_of
        self.left = left
        """Shards of the last stage that have not reported."""
        self.todo = todo
        """Devices that have not accounted for it."""
        self.end = 0
        """When the last stage ended it, as far as reported."""
        self.after = -1
        """When the batch before ended; -1: not yet known."""
        self.next: BatchRecord | None = None
        """The batch after, as long as that waits to hear of this one's end."""
        self.done = -1
        self.late = 0
        self.pure: Cause | None = None
        self.shares: dict[int, tuple[list[int], list[int]]] = {}
        """Stage -> causes and weights of a mixed batch."""


class TracedSpan(NamedTuple):
    """A span as it was accounted for."""

    span: Span
    made_of: MakeUp


class TracedGap(NamedTuple):
    """Time outside spans, and why."""

    cause: int
    began: int
    ended: int


class DeviceBook:
    """Where one device's time went, and the spans that wait to be accounted for."""

    __slots__ = ("device", "last_batch", "links", "peak", "pending", "rank", "series", "stage", "stands_for", "trace")

    def __init__(
        self, device: str, stage: int, rank: int, start: Nanoseconds, every: Nanoseconds | None, keep: int,
        peak: tuple[float, float] | None, keep_spans: int = 0,
    ) -> None:  # fmt: skip
        self.device, self.stage, self.rank = device, stage, rank
        self.series = Series(start, N_CAUSES, COUNTERS, every, keep)
        """`series.until` is the cursor: everything before has a cause."""
        self.pending: deque[tuple[Span, BatchRecord]] = deque()
        self.last_batch = -1
        """The last batch that is accounted for."""
        self.stands_for = 1
        """Devices that are accounted for here: the first of its stage stands for all that share its series."""
        self.peak = peak
        """Operations and bytes per second."""
        self.trace: deque[TracedSpan | TracedGap] = deque(maxlen=keep_spans)
        """The newest spans and gaps, in order."""
        self.links: dict[tuple[int, int], int] = {}
        """(op, size class) -> where its LINK_COUNTERS begin."""

    def spend(self, cause: int, until: int) -> None:
        """The time from the cursor to `until` had this cause."""
        series = self.series
        length = until - series.until
        if self.trace.maxlen:
            self.trace.append(TracedGap(cause, series.until, until))
        if until >= series.mark and length >= series.every:
            series.checkpoint()  # a long stretch has checkpoints of its own: what came before is kept apart
        series.totals[cause] += length
        series.until = until
        if until >= series.mark:
            series.checkpoint()

    def count_links(self, span: Span, klass: int) -> None:
        """Add what the span moved."""
        totals = self.series.totals
        for part in span.traffic:
            at = self.links.get((part.op, klass))
            if at is None:
                at = self.links[part.op, klass] = len(totals)
                totals += [0] * LINK_COUNTERS
            totals[at] += part.count
            totals[at + 1] += part.nbytes
            totals[at + 2] += part.waited
            totals[at + 3] += part.moving
