"""One replica's part of the ledger: what the brain told of it, and the books of its devices.

A gap before a span is explained by what is known of that time, first match. After the batch was issued: the device was
descheduled (`contended`), or the batch was not handed over (`host`). Before: the replica is `down`; its brain holds for
KV blocks (`kv_starved`) or by its policy (`held`); the batch before is still at another stage (`bubble`), or at a
slower peer of the last stage (`straggler`); requests are unfinished here (`host`), or wait elsewhere (`imbalance`);
nothing is asked for (`no_demand`).

In a simulation the devices of an equally split stage do the same, batch after batch. As long as all its batches are
reported for the whole of it (`stage_span`), its devices share one series, and each batch is accounted for once.
"""

from msgspec import structs

from evener.cost.base import CostModel
from evener.ledger import makeup
from evener.ledger.book import (
    BATCHES,
    BUSY,
    CPU,
    DECODE_ROWS,
    DECODE_STEPS,
    KBYTES,
    KFLOP,
    PREFILL_TOKENS,
    ROOF,
    SPANS,
    SPREAD,
    SPREAD_SHIFT,
    BatchRecord,
    DeviceBook,
    TracedSpan,
    size_class,
)
from evener.ledger.causes import Cause
from evener.ledger.divide import divide
from evener.ledger.history import History
from evener.ledger.shortage import Shortage
from evener.ledger.spans import HoldKind, MakeUp, Span
from evener.ledger.work import Work
from evener.units import NS_PER_S, Nanoseconds

# Plain integers: an IntEnum's arithmetic costs more than the rest of an account.
_DOWN, _KV, _HELD, _HOST, _NOBODY = (
    int(c) for c in (Cause.DOWN, Cause.KV_STARVED, Cause.HELD, Cause.HOST, Cause.NO_DEMAND)
)
_CONTENDED, _STRAGGLER, _TRANSFER, _BUBBLE, _UNATTRIBUTED = (
    int(c) for c in (Cause.CONTENDED, Cause.STRAGGLER, Cause.TRANSFER, Cause.BUBBLE, Cause.UNATTRIBUTED)
)
_NEVER = 1 << 62


class ReplicaBook:
    """Explains every nanosecond of the devices of one replica, once what explains it is known."""

    def __init__(
        self, index: int, stages: list[list[DeviceBook]], costs: CostModel, work: Work | None, waiting: History,
        start: Nanoseconds, every: Nanoseconds | None, keep: int,
    ) -> None:  # fmt: skip
        """`waiting`: whether a request waits at any replica (shared by all)."""
        self.index = index
        self.stages = stages
        self.devices = [book for stage in stages for book in stage]
        self.late_spans = 0
        """Spans that came when the replica was down already; their time counts as `down`."""
        self.why_down: str | None = "loading"
        self.down_since: int = start
        """When it went down last."""
        self.first_up = _NEVER
        self.short = Shortage(start, every, keep)
        self.records: dict[int, BatchRecord] = {}
        """Batches issued and not accounted for by every device, in order of issue."""
        self._costs = costs
        self._work = work
        self._waiting = waiting
        self._states = History(start, _DOWN)
        self._told = _NOBODY
        self._last: BatchRecord | None = None
        self._newest = -1
        self._last_stage = len(stages) - 1
        self._forget_at = 256
        self._kept: list[DeviceBook] = []
        """Books that are accounted for: of a stage whose devices share a series, the first."""
        for stage in stages:
            first = stage[0]
            if all(book.peak == first.peak and not book.trace.maxlen for book in stage):
                first.stands_for = len(stage)
                for book in stage:
                    book.series, book.links = first.series, first.links
            self._kept += stage[: len(stage) // first.stands_for]

    # ---- facts ------------------------------------------------------------------------------------------------

    def issued(self, batch_id: int, now: Nanoseconds, made_of: MakeUp) -> None:
        """See Journal."""
        assert batch_id > self._newest, f"batch {batch_id} is issued after batch {self._newest}"
        record = BatchRecord(now, made_of, len(self.stages[-1]), len(self.devices))
        last = self._last
        if last is None:
            record.after = 0
        elif last.left == 0:
            record.after = last.end
        else:
            last.next = record
        self._last = self.records[batch_id] = record
        self._newest = batch_id

    def done(self, batch_id: int, now: Nanoseconds, late_rows: int) -> None:
        """See Journal."""
        record = self.records[batch_id]
        record.done, record.late = now, late_rows
        record.pure = makeup.pure_cause(record.made_of, late_rows)
        if record.after >= 0:
            for book in self._kept:
                pending = book.pending
                if len(pending) == 1 and pending[0][1] is record:  # nearly always
                    self._account(book, pending.popleft()[0], record)
                    record.todo -= book.stands_for
                    if record.todo == 0:
                        del self.records[batch_id]
                elif pending:
                    self._drain(book)

    def state(self, now: Nanoseconds, hold: HoldKind, unfinished: bool, short_of_kv: bool) -> None:
        """See Journal."""
        self._told = _KV if hold == 1 else _HELD if hold == 2 else _HOST if unfinished else _NOBODY
        self.short.changes(now, short_of_kv)
        if self.why_down is None:
            self._states.change(now, self._told)
            if len(self._states) >= self._forget_at:
                self._forget(now)

    def up(self, now: Nanoseconds) -> None:
        """The replica serves from `now` on."""
        self.why_down = None
        self.first_up = min(self.first_up, now)
        self._states.change(now, self._told)

    def down(self, now: Nanoseconds, reason: str) -> None:
        """See Journal. What a device did in vain since its last whole span counts as down."""
        for stage in range(len(self.stages)):
            self._part(stage)
        lost = next((r for r in self.records.values() if r.done < 0), None)
        for book in self.devices:
            self._close(book, now, lost)
        self.records.clear()
        self._last = None
        self.short.ends(now)
        self.why_down, self.down_since, self._told = reason, now, _NOBODY
        self._states.change(now, _DOWN)

    # ---- spans ------------------------------------------------------------------------------------------------

    def span(self, span: Span) -> None:
        """A device reports a batch."""
        if self.stages[span.stage][0].stands_for > 1:
            self._part(span.stage)
        self._report(span, 1)

    def stage_span(self, span: Span) -> None:
        """All devices of a stage report that they did this; the rank does not matter."""
        books = self.stages[span.stage]
        if books[0].stands_for == len(books) > 1 and self._same_work(span):
            self._report(span, len(books))
            return
        for rank in range(len(books)):
            self.span(structs.replace(span, rank=rank))

    def _same_work(self, span: Span) -> bool:
        """Every device of the stage has as many operations and bytes to do in this batch."""
        work, record, ranks = self._work, self.records.get(span.batch_id), len(self.stages[span.stage])
        if work is None or record is None:
            return True
        of = [work.of(self.index, span.stage, rank, record.made_of.shape) for rank in range(ranks)]
        return of.count(of[0]) == ranks

    def _part(self, stage: int) -> None:
        """From here on every device of a stage is accounted for by itself."""
        first, *others = self.stages[stage]
        if first.stands_for > 1:
            first.stands_for = 1
            for book in others:
                book.series, book.links = first.series.copy(), dict(first.links)
                book.last_batch = first.last_batch
                book.pending.extend(first.pending)
            self._kept = [book for books in self.stages for book in books[: len(books) // books[0].stands_for]]

    def _report(self, span: Span, devices: int) -> None:
        """So many devices report a batch."""
        record = self.records.get(span.batch_id)
        if record is None:
            assert span.batch_id <= self._newest, f"span of batch {span.batch_id}, which was never issued: {span}"
            self.late_spans += devices
            return
        stage = span.stage
        book = self.stages[stage][span.rank if devices == 1 else 0]
        book.pending.append((span, record))
        if stage == self._last_stage:
            record.left -= devices
            if span.ended > record.end:
                record.end = span.ended
            following = record.next
            if record.left == 0 and following is not None:
                following.after = record.end
                record.next = None
                if following.done >= 0:  # it waited to hear of this end
                    for other in self._kept:
                        self._drain(other)
                    return
        if record.done >= 0:
            self._drain(book)

    def settle(self, now: Nanoseconds) -> None:
        """Account for the open end of an idle (or lost) replica; a busy one is known up to its last spans."""
        if self.records:
            return
        after = self._last.end if self._last is not None else 0
        for book in self._kept:
            self._explain(book, now, after)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _drain(self, book: DeviceBook) -> None:
        pending = book.pending
        while pending:
            span, record = pending[0]
            if record.done < 0 or record.after < 0:
                return
            pending.popleft()
            self._account(book, span, record)
            record.todo -= book.stands_for
            if record.todo == 0:
                del self.records[span.batch_id]

    def _account(self, book: DeviceBook, span: Span, record: BatchRecord) -> None:
        series = book.series
        totals = series.totals
        began, ended, free = span.began, span.ended, series.until
        due = ended >= series.mark
        if began != free:
            if record.issued > free or due or span.idle_contended or book.trace.maxlen or began < free:
                self._gap(book, span, record)
            else:  # nearly always: it was issued and not handed over
                totals[_HOST] += began - free
        if due and ended - began >= series.every:
            series.checkpoint()
        compute = span.compute
        if compute:
            pure = record.pure
            if pure is not None:
                totals[pure] += compute
            else:
                self._divide(book, span, record)
        contended, straggler, transfer, bubble = span.contended, span.straggler, span.transfer, span.bubble
        length = ended - began
        rest = length - compute
        if contended:
            totals[_CONTENDED] += contended
            rest -= contended
        if straggler:
            totals[_STRAGGLER] += straggler
            rest -= straggler
        if transfer:
            totals[_TRANSFER] += transfer
            rest -= transfer
        if bubble:
            totals[_BUBBLE] += bubble
            rest -= bubble
        busy = length - bubble
        if span.host:  # between the steps of a span there was no batch in hand
            totals[_HOST] += span.host
            rest -= span.host
            busy -= span.host
        if rest:
            assert rest > 0, f"the parts of a span are {-rest} ns longer than it: {span}"
            totals[_UNATTRIBUTED] += rest
        series.until = ended
        book.last_batch = span.batch_id
        repeat = span.repeat
        shape = record.made_of.shape
        rows, prompt = shape.decode_rows, shape.prefill_tokens
        totals[CPU] += span.cpu
        totals[BATCHES] += repeat
        totals[SPANS] += 1
        totals[BUSY] += busy
        busy >>= SPREAD_SHIFT
        totals[SPREAD] += busy * busy // repeat
        if rows:
            totals[DECODE_ROWS] += rows * repeat
            totals[DECODE_STEPS] += repeat
        if prompt:
            totals[PREFILL_TOKENS] += prompt
        if span.traffic:
            book.count_links(span, size_class(shape))
        if book.trace.maxlen:
            book.trace.append(TracedSpan(span, record.made_of))
        if book.peak is not None:
            self._count_work(book, span, record)
        if due and ended >= series.mark:
            series.checkpoint()

    def _gap(self, book: DeviceBook, span: Span, record: BatchRecord) -> None:
        series, began = book.series, span.began
        assert began > series.until, f"a span begins {series.until - began} ns before its device was free: {span}"
        if record.issued > series.until:
            self._explain(book, min(record.issued, began), record.after)
        if began > series.until and span.idle_contended:
            book.spend(_CONTENDED, min(began, series.until + span.idle_contended))
        if began > series.until:
            book.spend(_HOST, began)

    def _divide(self, book: DeviceBook, span: Span, record: BatchRecord) -> None:
        totals, compute = book.series.totals, span.compute
        shares = record.shares.get(span.stage)
        if shares is None:
            shares = makeup.weights(self._costs, self.index, span.stage, record.made_of, record.late, span.repeat)
            record.shares[span.stage] = shares
        causes, parts = shares
        for cause, part in zip(causes, divide(compute, parts), strict=True):
            totals[cause] += part

    def _count_work(self, book: DeviceBook, span: Span, record: BatchRecord) -> None:
        assert self._work is not None and book.peak is not None
        flop, nbytes = self._work.of(self.index, book.stage, book.rank, record.made_of.shape)
        totals, repeat = book.series.totals, span.repeat
        totals[KFLOP] += int(flop) * repeat // 1000
        totals[KBYTES] += int(nbytes) * repeat // 1000
        totals[ROOF] += int(max(flop / book.peak[0], nbytes / book.peak[1]) * NS_PER_S) * repeat

    def _explain(self, book: DeviceBook, until: int, after: int) -> None:
        """Idle time from the cursor to `until`, before anything was issued; the batch before ended at `after`."""
        if until <= book.series.until:
            return
        states = self._states
        if states.last == _HOST and states.since(book.series.until) and after <= book.series.until:
            book.spend(_HOST, until)  # nearly always
            return
        for began, ended, state in states.pieces(book.series.until, until):
            if state in (_HOST, _NOBODY):
                if began < after:
                    at = min(ended, after)
                    book.spend(_STRAGGLER if book.stage == self._last_stage else _BUBBLE, at)
                    began = at
                if began < ended:
                    if state == _HOST:
                        book.spend(_HOST, ended)
                    else:
                        for _, end, anybody in self._waiting.pieces(began, ended):
                            book.spend(int(Cause.IMBALANCE) if anybody else _NOBODY, end)
            else:
                book.spend(state, ended)

    def _close(self, book: DeviceBook, now: Nanoseconds, lost: BatchRecord | None) -> None:
        """The replica is down from `now` on: account for what the device did until then. `lost`: the first batch that
        will never be done."""
        for span, record in book.pending:
            record.after = _end_before(record)
            if record.done < 0:
                record.pure = makeup.pure_cause(record.made_of, 0)
            if span.ended <= now:
                self._account(book, span, record)
            elif span.began < now:  # cut off: whatever it had done is lost
                if span.began > book.series.until:
                    self._gap(book, span, record)
                book.spend(_DOWN, now)
        book.pending.clear()
        for batch_id, record in self.records.items():
            if batch_id > book.last_batch and record.done >= 0:  # its span was lost on the way
                self._explain(book, record.issued, _end_before(record))
                if record.done > book.series.until:
                    book.spend(_UNATTRIBUTED, record.done)
        if lost is not None:
            self._explain(book, lost.issued, _end_before(lost))
            if now > book.series.until:
                book.spend(_DOWN, now)
        else:
            last = self._last
            self._explain(book, now, 0 if last is None else last.end if last.left == 0 else last.done)

    def passed(self) -> int:
        """Everything before is accounted for on every device."""
        return min(book.series.until for book in self.devices)

    def _forget(self, now: Nanoseconds) -> None:
        self.settle(now)
        self._states.forget(self.passed())
        self._forget_at = max(256, 2 * len(self._states))


def _end_before(record: BatchRecord) -> int:
    """When the batch before this one ended; for ever, if that will not be known any more."""
    return record.after if record.after >= 0 else _NEVER
