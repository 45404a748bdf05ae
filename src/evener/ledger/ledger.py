"""The ledger: the brain's facts and the bodies' spans in, accounts out. Every device-second has exactly one cause.

A span is accounted for once its batch is done, because only then its late rows are known, and once the end of the batch
before is known, because that explains the gap in front of it. Spans may come later than the facts, in any bundles; the
facts come in order, and never later than the spans of the batch they concern.
"""

from typing import Any

from evener.cost.base import CostModel
from evener.errors import InvalidInput
from evener.ledger.account import (
    Account,
    DeviceAccount,
    LinkAccount,
    ReplicaAccount,
    StageAccount,
    Use,
    decode_rows,
    links_of,
    prefill_tokens,
    sum_of,
    use_of,
)
from evener.ledger.book import COUNTERS, DeviceBook
from evener.ledger.causes import N_CAUSES, Cause
from evener.ledger.history import History
from evener.ledger.replica import ReplicaBook
from evener.ledger.requests import Phase, RequestAccount, RequestLog, Step, Stretch, stretches
from evener.ledger.spans import HoldKind, MakeUp, Milestone, Span
from evener.ledger.work import Work
from evener.spec.plan import Plan, size
from evener.units import NS_PER_S, Nanoseconds

RESOLUTION = Nanoseconds(NS_PER_S // 4)


class Ledger:
    """Implements `Journal`. All times are absolute nanoseconds of the body's clock."""

    def __init__(
        self, plan: Plan, costs: CostModel, *, start: Nanoseconds, work: Work | None = None,
        resolution: Nanoseconds | None = RESOLUTION, keep: int = 14400, follow_requests: int = 1000,
    ) -> None:  # fmt: skip
        """Every replica is down (`loading`) from `start` until `up` is called.

        `work`: to set compute beside the peak. `resolution`: a checkpoint at most so often, of which the last `keep`
        stay; None keeps totals only. `follow_requests`: of so many requests, the newest, the milestones are kept.
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
                    DeviceBook(shard.device, s, k, start, resolution, keep, work.peak(shard.device) if work else None)
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
        self.now = max(self.now, now)
        self._requests.tell(request_id, Step(what, now, replica, tokens))
        if what == Milestone.FIRST_TOKEN:
            return
        at, prompt, waits = self._tokens_waiting.pop(request_id, (replica, 0, 0))
        if waits:
            self._replicas[at].waits(now, -waits)
        if what == Milestone.ENDED:
            return
        if what == Milestone.ARRIVED:
            prompt = tokens
        waits = 0 if what == Milestone.ADMITTED else prompt if what == Milestone.ARRIVED else prompt + tokens
        if waits:
            self._replicas[replica].waits(now, waits)
        self._tokens_waiting[request_id] = (replica, prompt, waits)

    # ---- the bodies -------------------------------------------------------------------------------------------

    def span(self, span: Span) -> None:
        """A device reports a batch; one device's spans come in order."""
        self._replicas[span.replica].span(span)

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
        InvalidInput for a window that runs backwards, or for any where no checkpoints are kept.
        """
        books = [book for replica in self._replicas for book in replica.devices]
        latest: int = max(book.series.until for book in books)
        began: int = self.start if since is None else max(self.start, since)
        ended = latest if until is None else min(latest, until)
        if (began != self.start or ended != latest) and self.resolution is None:
            raise InvalidInput("this ledger keeps totals only (resolution=None): ask without `since` and `until`")
        if since is not None and until is not None and since > until:
            raise InvalidInput(f"the window [{since}, {until}) runs backwards; give since <= until")
        if began > self.start:
            began = max(began, *(book.series.first for book in books), *(r.short.first for r in self._replicas))
        ended = max(began, ended)
        devices: dict[str, DeviceAccount] = {}
        stages: dict[str, StageAccount] = {}
        replicas: dict[str, ReplicaAccount] = {}
        links: list[LinkAccount] = []
        everything = []
        for replica in self._replicas:
            replica.count_to(self.now)
            of_replica = []
            for s, stage in enumerate(replica.stages):
                rows = [_window(book, began, ended) for book in stage]
                spec = self.plan.replicas[replica.index].stages[s]
                place: dict[str, Any] = {"replica": replica.index, "stage": s}
                for k, (book, row) in enumerate(zip(stage, rows, strict=True)):
                    shard = spec.shards[k]
                    devices[book.device] = DeviceAccount(
                        rank=k, heads=size(shard.heads), ffn=size(shard.ffn), **place, **self._use([book], row)
                    )
                stages[f"{replica.index}.{s}"] = StageAccount(
                    layers=size(spec.layers), devices=tuple(b.device for b in stage), **place,
                    **self._use(stage, sum_of(rows, COUNTERS)),
                )  # fmt: skip
                links += links_of(replica.index, s, list(zip(stage, rows, strict=True)))
                of_replica += rows
            together = sum_of(of_replica, COUNTERS)
            short = replica.short
            short_ns, token_us = short.between(min(began, short.until), min(ended, short.until))
            replicas[str(replica.index)] = ReplicaAccount(
                devices=tuple(b.device for b in replica.devices), short_of_kv_s=short_ns / NS_PER_S,
                short_of_kv_tokens=token_us * 1000 // short_ns if short_ns else 0,
                mean_decode_rows=decode_rows(together), down=replica.why_down,
                prefill_tokens=prefill_tokens(together, len(replica.devices)),
                **self._use(replica.devices, together),
            )  # fmt: skip
            everything.append(together)
        return Account(
            window_s=(ended - began) / NS_PER_S, since_s=(began - self.start) / NS_PER_S,
            until_s=(ended - self.start) / NS_PER_S, epoch=self.plan.epoch, devices=devices, stages=stages,
            replicas=replicas, total=Use(**self._use(books, sum_of(everything, COUNTERS))), links=tuple(links),
            late_spans=sum(r.late_spans for r in self._replicas),
        )  # fmt: skip

    def requests(self) -> list[str]:
        """Ids of the requests that are followed, oldest first."""
        return self._requests.ids()

    def request_account(self, request_id: str) -> RequestAccount | None:
        """Where one request's latency went; None if it is not followed (any more)."""
        steps = self._requests.steps(request_id)
        if not steps:
            return None
        last = steps[-1]
        ended = last.now if last.what == Milestone.ENDED else None
        return RequestAccount(
            request_id=request_id,
            arrived=steps[0].now,
            ended=ended,
            prompt_tokens=steps[0].tokens,
            output_tokens=max((s.tokens for s in steps[1:]), default=0),
            preempted=sum(s.what == Milestone.PREEMPTED for s in steps),
            moved=sum(s.what == Milestone.MOVED for s in steps),
            phases=tuple(self._phase(s) for s in stretches(steps, self.now)),
        )

    # ---- inside -----------------------------------------------------------------------------------------------

    def _use(self, books: list[DeviceBook], counters: list[int]) -> dict[str, Any]:
        return use_of(counters, has_peak=all(book.peak is not None for book in books))

    def _phase(self, part: Stretch) -> Phase:
        books = self._replicas[part.replica].devices
        sums = [0] * N_CAUSES
        for book in books:
            # What is forgotten, or never kept, has no causes.
            if self.resolution is not None and part.began >= book.series.first:
                for c, grown in enumerate(_window(book, part.began, part.ended)[:N_CAUSES]):
                    sums[c] += grown
        causes = {c.label: sums[c] / len(books) / NS_PER_S for c in Cause if sums[c]}
        seconds = (part.ended - part.began) / NS_PER_S
        return Phase(part.name, part.replica, part.began, part.ended, seconds, causes)


def _window(book: DeviceBook, since: int, until: int) -> list[int]:
    """Growth of a device's counters in a window, as far as it is accounted for."""
    series = book.series
    return series.between(min(since, series.until), min(until, series.until))
