"""A cost model fitted to recorded runs: every batch that they had, and what it took on every device."""

from collections.abc import Iterable
from pathlib import Path

from evener.brain import Brain
from evener.cost.roofline import RooflineCostModel
from evener.engine.events import BatchDone, IssueBatch
from evener.errors import InvalidInput
from evener.execute.live.record import Entry, Kept, Timing
from evener.execute.served import Header
from evener.ledger.spans import HoldKind, MakeUp, Milestone, Span
from evener.profile.refit import Refit
from evener.spec.plan import Plan
from evener.units import Nanoseconds
from evener.workload.replay import open_recording, recorded_costs


class _Issue:
    """A batch on its way."""

    __slots__ = ("changes", "made_of", "since")

    def __init__(self, made_of: MakeUp, changes: int, since: int) -> None:
        self.made_of = made_of
        self.changes = changes
        """Rows that came, went or are sampled."""
        self.since = since
        """When there was reason to issue it: a request came, or (-1 - id) the batch with this id ended."""


class _Observer:
    """Hears what the brain issues; a `Journal`."""

    def __init__(self) -> None:
        self.made_of: dict[tuple[int, int], MakeUp] = {}

    def issued(self, replica: int, batch_id: int, now: Nanoseconds, made_of: MakeUp) -> None:
        """See Journal."""
        self.made_of[replica, batch_id] = made_of

    def done(self, replica: int, batch_id: int, now: Nanoseconds, late_rows: int) -> None:
        """See Journal."""

    def state(self, replica: int, now: Nanoseconds, hold: HoldKind, unfinished: bool, short_of_kv: bool) -> None:
        """See Journal."""

    def waiting(self, now: Nanoseconds, anybody: bool) -> None:
        """See Journal."""

    def down(self, replica: int, now: Nanoseconds, reason: str) -> None:
        """See Journal."""

    def request(self, request_id: str, replica: int, now: Nanoseconds, what: Milestone, tokens: int) -> None:
        """See Journal."""


def observe(path: Path, *more: Path) -> Refit:
    """What recordings of one plan say about its cost model; `fit` then makes the better one.

    Raises InvalidInput for a file that is no recording, without spans, or of another plan or cost model than the first.
    """
    header, _ = open_recording(path)
    base = recorded_costs(header)
    assert isinstance(base, RooflineCostModel)
    refit = Refit(base, kept=None)  # or of several runs the last alone would count
    for each in (path, *more):
        other, kept = open_recording(each)
        if (other.plan, other.costs) != (header.plan, header.costs):
            raise InvalidInput(f"{each} is of another plan or cost model than {path}; fit them one by one")
        _hear(each, other, kept, refit)
    return refit


def _hear(path: Path, header: Header, kept: Iterable[Kept], refit: Refit) -> None:
    observer = _Observer()
    brain = Brain(header.plan, header.kv_blocks, refit.base, header.brain, journal=observer)
    hosts = _Hosts(header.plan, refit)
    spans = 0
    for record in kept:
        if isinstance(record, Entry):
            for command in brain.step(record.event, record.now):
                if isinstance(command, IssueBatch):
                    at, batch = (command.replica, command.batch.batch_id), command.batch
                    made_of = observer.made_of.pop(at)
                    refit.issued(*at, made_of)
                    changes = len(batch.new) + len(batch.drop) + made_of.shape.sampled_rows
                    done = record.event.result.batch_id if isinstance(record.event, BatchDone) else None
                    hosts.issue(*at, _Issue(made_of, changes, record.now if done is None else -1 - done))
        elif isinstance(record, Timing):
            for span in record.spans:
                refit.span(span)
                hosts.span(span)
            spans += len(record.spans)
    if not spans:
        raise InvalidInput(f"{path} has no spans to fit a cost model to; record with the ledger on")


class _Hosts:
    """Finds the control time of batches: from the reason to issue one until its first stage begins with it."""

    def __init__(self, plan: Plan, refit: Refit) -> None:
        self._refit = refit
        self._last = [len(r.stages) - 1 for r in plan.replicas]
        self._issues: dict[tuple[int, int], _Issue] = {}
        self._ends: dict[tuple[int, int], int] = {}
        """Batch -> when its last stage ended it."""
        self._before: dict[int, int] = {}
        """Replica -> when its first device ended the batch before."""

    def issue(self, replica: int, batch_id: int, issue: _Issue) -> None:
        """The brain handed a batch over."""
        self._issues[replica, batch_id] = issue

    def span(self, span: Span) -> None:
        """What a device did; the first rank of the first stage, and of the last, matter here."""
        at = span.replica, span.batch_id
        if span.rank:
            return
        if span.stage == self._last[span.replica]:
            self._ends[at] = span.ended
        if span.stage == 0:
            issue = self._issues.pop(at, None)
            before = self._before.get(span.replica)
            self._before[span.replica] = span.ended
            if issue is None or before is None:
                return
            reason = issue.since if issue.since >= 0 else self._ends.get((span.replica, -1 - issue.since))
            # Without the end of the batch that it waited for (its bundle is not here yet) nothing is known.
            if reason is not None:
                took = span.began - max(before, reason) - span.idle_contended
                if took > 0:
                    self._refit.host(took, issue.changes)
        if len(self._ends) > 4096:
            del self._ends[next(iter(self._ends))]
