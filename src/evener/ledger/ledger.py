"""The ledger: the brain's facts and the bodies' spans in, accounts out. Every device-second has exactly one cause.

A span is accounted for once its batch is done, because only then its late rows are known, and once the end of the batch
before is known, because that explains the gap in front of it. Spans may come later than the facts, in any bundles; the
facts come in order, and never later than the spans of the batch they concern.
"""

from evener.cost.base import CostModel
from evener.errors import InvalidInput
from evener.ledger.account import Account, read_account, window
from evener.ledger.book import DeviceBook
from evener.ledger.causes import N_CAUSES, Cause
from evener.ledger.history import History
from evener.ledger.replica import ReplicaBook
from evener.ledger.requests import Phase, RequestAccount, RequestLog, Step, Stretch, stretches
from evener.ledger.spans import HoldKind, MakeUp, Milestone, Span
from evener.ledger.work import Work
from evener.spec.plan import Plan
from evener.units import NS_PER_S, Nanoseconds

RESOLUTION = Nanoseconds(NS_PER_S // 4)
EVERYTHING = 1 << 62
"""Checkpoints to keep of a run that has ended: all."""


class Ledger:
    """Implements `Journal`. All times are absolute nanoseconds of the body's clock."""

    def __init__(
        self, plan: Plan, costs: CostModel, *, start: Nanoseconds, work: Work | None = None,
        resolution: Nanoseconds | None = RESOLUTION, keep: int = 14400, follow_requests: int = 1000,
        keep_spans: int = 0,
    ) -> None:  # fmt: skip
        """Every replica is down (`loading`) from `start` until `up` is called.

        `work`: to set compute beside the peak. `resolution`: a checkpoint at most so often, of which the last `keep`
        stay; None keeps totals only. `follow_requests`: of so many requests, the newest, the milestones are kept.
        `keep_spans`: so many of each device's newest spans and gaps are kept for traces.
        Raises InvalidInput for a plan that names a device twice.
        """
        names = plan.devices()
        if len(set(names)) < len(names):
            twice = sorted({n for n in names if names.count(n) > 1})
            raise InvalidInput(f"the plan uses {', '.join(twice)} twice; name a second worker there {twice[0]}#1")
        self.plan = plan
        self.start = start
        self.now = start
        """The latest time that the ledger heard of. A simulator may tell of one replica later than of another."""
        self.resolution = resolution
        self._waiting = History(start, False)
        self._waiting_forget_at = 1024
        self._requests = RequestLog(follow_requests)
        self._tokens_waiting: dict[str, tuple[int, int, int]] = {}
        """Request -> (replica, prompt tokens, tokens that wait)."""
        self._replicas = []
        for r, replica in enumerate(plan.replicas):
            stages = [
                [
                    DeviceBook(
                        shard.device,
                        s,
                        k,
                        start,
                        resolution,
                        keep,
                        work.peak(shard.device) if work else None,
                        keep_spans,
                    )
                    for k, shard in enumerate(stage.shards)
                ]
                for s, stage in enumerate(replica.stages)
            ]
            self._replicas.append(ReplicaBook(r, stages, costs, work, self._waiting, start, resolution, keep))

    # ---- the journal of the brain -----------------------------------------------------------------------------

    def issued(self, replica: int, batch_id: int, now: Nanoseconds, made_of: MakeUp) -> None:
        """A batch was handed over. Repeated steps that one span covers are told once, as their first."""
        self._replicas[replica].issued(batch_id, now, made_of)

    def done(self, replica: int, batch_id: int, now: Nanoseconds, late_rows: int) -> None:
        """Its result was consumed."""
        if now > self.now:
            self.now = now
        self._replicas[replica].done(batch_id, now, late_rows)

    def state(self, replica: int, now: Nanoseconds, hold: HoldKind, unfinished: bool, short_of_kv: bool) -> None:
        """What the replica is in from `now` on. While it is down this takes effect with `up`."""
        self.now = max(self.now, now)
        self._replicas[replica].state(now, hold, unfinished, short_of_kv)

    def waiting(self, now: Nanoseconds, anybody: bool) -> None:
        """Whether any request waits at any replica from `now` on."""
        self.now = max(self.now, now)
        self._waiting.change(now, anybody)
        if len(self._waiting) >= self._waiting_forget_at:
            self.settle(now)
            self._waiting.forget(min(r.passed() for r in self._replicas))
            self._waiting_forget_at = max(1024, 2 * len(self._waiting))

    def down(self, replica: int, now: Nanoseconds, reason: str) -> None:
        """The replica computes nothing from `now` on; what it had in flight was in vain."""
        self.now = max(self.now, now)
        self._replicas[replica].down(now, reason)

    def request(self, request_id: str, replica: int, now: Nanoseconds, what: Milestone, tokens: int) -> None:
        """A request reached a milestone."""
        if now > self.now:
            self.now = now
        self._requests.tell(request_id, Step(what, now, replica, tokens))
        if what == Milestone.FIRST_TOKEN:
            return
        at, prompt, waits = self._tokens_waiting.pop(request_id, (replica, 0, 0))
        if waits:
            self._replicas[at].short.waits(now, -waits)
        if what == Milestone.ENDED:
            return
        if what == Milestone.ARRIVED:
            prompt = tokens
        waits = 0 if what == Milestone.ADMITTED else prompt if what == Milestone.ARRIVED else prompt + tokens
        if waits:
            self._replicas[replica].short.waits(now, waits)
        self._tokens_waiting[request_id] = (replica, prompt, waits)

    # ---- the bodies -------------------------------------------------------------------------------------------

    def span(self, span: Span) -> None:
        """A device reports a batch; one device's spans come in order."""
        self._replicas[span.replica].span(span)

    def stage_span(self, span: Span) -> None:
        """All devices of a stage report that they did this, as `span` would be told for each."""
        self._replicas[span.replica].stage_span(span)

    def up(self, replica: int, now: Nanoseconds) -> None:
        """Loading (or mending) is over."""
        self.now = max(self.now, now)
        self._replicas[replica].up(now)
        self._replicas[replica].settle(now)

    def settle(self, now: Nanoseconds) -> None:
        """All facts before `now` were told: account for idle devices up to it."""
        self.now = max(self.now, now)
        for replica in self._replicas:
            replica.settle(now)

    # ---- reading ----------------------------------------------------------------------------------------------

    def account(self, since: Nanoseconds | None = None, until: Nanoseconds | None = None) -> Account:
        """Where the time of [since, until) went; by default all since the start. Call `settle` before.

        A window that begins before the oldest checkpoint kept begins there; it ends with what is accounted for. Raises
        InvalidInput for a window that runs backwards or that is wholly forgotten, or for any where no checkpoints are
        kept.
        """
        books = [book for replica in self._replicas for book in replica.devices]
        latest: int = max(book.series.until for book in books)
        began: int = self.start if since is None else max(self.start, since)
        ended = latest if until is None else min(latest, until)
        if (began != self.start or ended != latest) and self.resolution is None:
            raise InvalidInput("this ledger keeps totals only (resolution=None): ask without `since` and `until`")
        if since is not None and until is not None and since > until:
            raise InvalidInput(f"the window [{since}, {until}) runs backwards; give since <= until")
        if began > self.start or ended < latest:
            kept = max(*(book.series.first for book in books), *(r.short.series.first for r in self._replicas))
            if until is not None and until < kept and kept > self.start:
                raise InvalidInput(
                    f"the window ends {(until - self.start) / NS_PER_S:.1f} s after the start, what happened before "
                    f"{(kept - self.start) / NS_PER_S:.1f} s is forgotten; ask for a later one"
                )
            began = max(began, kept)
        ended = max(began, ended)
        for replica in self._replicas:
            replica.short.count_to(self.now)
        return read_account(self.plan, self._replicas, self.start, began, ended)

    def books(self) -> list[list[DeviceBook]]:
        """The devices' books by replica, for exports."""
        return [replica.devices for replica in self._replicas]

    def requests(self) -> list[str]:
        """Ids of the requests that are followed, oldest first."""
        return self._requests.ids()

    def steps(self, request_id: str) -> list[Step]:
        """Its milestones in order; empty if it is not followed (any more)."""
        return self._requests.steps(request_id)

    def request_account(self, request_id: str) -> RequestAccount | None:
        """Where one request's latency went; None if it is not followed (any more)."""
        steps = self.steps(request_id)
        if not steps:
            return None
        last = steps[-1]
        ended = last.now if last.what == Milestone.ENDED else None
        return RequestAccount(
            request_id=request_id,
            arrived=steps[0].now,
            ended=ended,
            prompt_tokens=steps[0].tokens,
            output_tokens=None if ended is None else last.tokens,
            preempted=sum(s.what == Milestone.PREEMPTED for s in steps),
            moved=sum(s.what == Milestone.MOVED for s in steps),
            phases=tuple(self._phase(s) for s in stretches(steps, self.now)),
        )

    # ---- inside -----------------------------------------------------------------------------------------------

    def _phase(self, part: Stretch) -> Phase:
        books = self._replicas[part.replica].devices
        sums = [0] * N_CAUSES
        for book in books:
            # What is forgotten, or never kept, has no causes.
            if self.resolution is not None and part.began >= book.series.first:
                for c, grown in enumerate(window(book, part.began, part.ended)[:N_CAUSES]):
                    sums[c] += grown
        causes = {c.label: sums[c] / len(books) / NS_PER_S for c in Cause if sums[c]}
        seconds = (part.ended - part.began) / NS_PER_S
        return Phase(part.name, part.replica, part.began, part.ended, seconds, causes)
