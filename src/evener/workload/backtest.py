"""The back-test: what a cost model and the simulator say of a recorded run, beside what the run achieved.

The recorded arrivals go through the simulator with the recorded plan, limits and policies; output lengths are those
that the run had. Times are those of the engine (a request's arrival there, an answer's leaving it), without HTTP; an
answer ends when the engine knows that it has ended, which after an end-of-sequence token is one step later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, structs

from evener.brain import Brain
from evener.cost.base import CostModel
from evener.engine.events import Answer, Arrived, Cancelled, Refuse, WorkerDown
from evener.engine.request import Request
from evener.errors import InvalidInput
from evener.execute.live.record import Entry, Header
from evener.execute.sim.body import Simulator
from evener.execute.sim.traffic import Failure, SimRequest, SlowDown
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.ledger import Ledger
from evener.units import NS_PER_S, Nanoseconds
from evener.workload import drive
from evener.workload.rehearse import NO_SUMMARY, Rehearsal, fill_record
from evener.workload.replay import Replayed, open_recording, recorded_work
from evener.workload.report import Report, Summary, make_report
from evener.workload.slo import Slo

MOST_LOST = 20.0
"""A device that computed next to nothing in a second is slowed down by no more than this."""


class Served(Struct):
    """One request of a recorded run. Times are absolute nanoseconds."""

    request: Request
    arrived: Nanoseconds
    answers: list[tuple[Nanoseconds, int]] = []
    """When tokens left the engine, and how many."""
    ended: Nanoseconds | None = None
    finish: str = "unfinished"
    """`stop`, `length`, `cancelled`, or the code of a refusal."""
    cancelled: Nanoseconds | None = None
    """When the client left."""

    @property
    def tokens(self) -> int:
        """Output tokens."""
        return sum(count for _, count in self.answers)


class Traffic(NamedTuple):
    """What a recorded run had to serve."""

    header: Header
    requests: list[Served]
    """In order of arrival."""
    failures: list[Failure]


def read_traffic(path: Path, skip: int = 0) -> Traffic:
    """The requests of a recording without the first `skip` (a warm-up), and the workers it lost.

    Raises InvalidInput when nothing is left, or the file is no recording.
    """
    header, kept = open_recording(path)
    served: dict[str, Served] = {}
    failures = []
    for record in kept:
        if not isinstance(record, Entry):
            continue
        event = record.event
        if isinstance(event, Arrived):
            served[event.request.request_id] = Served(event.request, record.now)
        elif isinstance(event, Cancelled) and event.request_id in served and not event.stopped:
            served[event.request_id].cancelled = record.now
        elif isinstance(event, WorkerDown):
            failures.append(Failure(event.device, record.now))
        for command in record.commands:
            if isinstance(command, Answer):
                one = served[command.request_id]
                if command.count:
                    one.answers.append((record.now, command.count))
                if command.finish is not None:
                    one.ended, one.finish = record.now, command.finish
            elif isinstance(command, Refuse):
                served[command.request_id].ended, served[command.request_id].finish = record.now, command.code
    requests = list(served.values())[skip:]
    if not requests:
        raise InvalidInput(f"{path} has {len(served)} requests, {skip} are skipped; nothing is left to compare")
    return Traffic(header, requests, failures)


def achieved(traffic: Traffic, replayed: Replayed, slo: Slo | None = None) -> Rehearsal:
    """What the recorded run did with these requests, from their first arrival to the end of the last."""
    start, end = _window(traffic)
    run = drive.new_run([], open_loop=True)
    for k, one in enumerate(traffic.requests):
        record = drive.Record(k, one.request.max_tokens, (one.arrived - start) / NS_PER_S)
        record.sent_s, record.ended_s = record.scheduled_s, ((one.ended or end) - start) / NS_PER_S
        # As the simulator tells it: the first token, and the end.
        record.chunk_s = [(one.answers[0][0] - start) / NS_PER_S, record.ended_s] if one.answers else []
        record.input_tokens, record.output_tokens = one.request.prompt_len, one.tokens
        record.failure = None if one.finish in ("stop", "length") and one.answers else one.finish
        run.records.append(record)
    run.duration_s = (end - start) / NS_PER_S
    if replayed.ledger is None:
        raise InvalidInput("the recording has no ledger to compare with (see `evener replay` without a cost model)")
    report = structs.replace(make_report(run, slo), itl_ms=NO_SUMMARY, tokens_per_chunk=None)
    return Rehearsal(live=True, report=report, account=replayed.ledger.account(start, end))


def predicted(
    traffic: Traffic, costs: CostModel, slo: Slo | None = None, slow_downs: Sequence[SlowDown] = ()
) -> Rehearsal:
    """The same requests at the same times through the simulator, with these costs.

    `slow_downs`: what cannot be known beforehand, as `others_took` finds it; times after the first arrival.
    """
    header = traffic.header
    start, _ = _window(traffic)
    ledger = Ledger(header.plan, costs, start=Nanoseconds(0), work=recorded_work(header))
    brain = Brain(header.plan, header.kv_blocks, costs, header.brain, journal=ledger)
    todo = [_again(one, start) for one in traffic.requests]
    failures = [Failure(f.device, Nanoseconds(max(0, f.at - start))) for f in traffic.failures]
    outcomes = Simulator(brain, costs, todo, failures, slow_downs=slow_downs, ledger=ledger).run()
    run = drive.new_run([], open_loop=True)
    for k, (one, outcome) in enumerate(zip(traffic.requests, outcomes, strict=True)):
        record = drive.Record(k, one.request.max_tokens, outcome.arrival / NS_PER_S)
        fill_record(record, outcome, one.request.prompt_len)
        run.records.append(record)
    run.duration_s = max(r.ended_s for r in run.records)
    report = structs.replace(make_report(run, slo), itl_ms=NO_SUMMARY, tokens_per_chunk=None)
    end = Nanoseconds(round(run.duration_s * NS_PER_S))
    return Rehearsal(live=False, report=report, account=ledger.account(Nanoseconds(0), end))


def others_took(traffic: Traffic, replayed: Replayed) -> list[SlowDown]:
    """How much longer each device took for its work because others had its cores, second by second.

    A prediction with these tells the model's own error apart from what nobody could predict. The ranks of a stage lose
    their cores in turns and wait for each other, so each takes longer by what all of them lost.
    """
    assert replayed.ledger is not None, "without spans nobody knows"
    start, end = _window(traffic)
    out = []
    before: dict[str, float] = {}
    for at in range(start, end, NS_PER_S):
        account = replayed.ledger.account(Nanoseconds(at), Nanoseconds(min(end, at + NS_PER_S)))
        for stage in account.stages.values():
            lost = stage.causes[Cause.CONTENDED.label]
            for name in stage.devices:
                compute = account.devices[name].compute_s
                factor = min(MOST_LOST, 1 + lost / compute) if compute else 1.0
                if factor != before.get(name, 1.0):
                    out.append(SlowDown(name, Nanoseconds(at - start), factor))
                    before[name] = factor
    return out


def _window(traffic: Traffic) -> tuple[Nanoseconds, Nanoseconds]:
    start = traffic.requests[0].arrived
    return start, max([one.ended for one in traffic.requests if one.ended is not None], default=start)


def _again(one: Served, start: Nanoseconds) -> SimRequest:
    """The brain must not see what stop strings did; what a client's leaving did, happens at the same time."""
    length = one.tokens if one.finish == "stop" else one.request.max_tokens
    left = one.cancelled if one.finish == "cancelled" else None
    return SimRequest(
        one.request, Nanoseconds(one.arrived - start), length, Nanoseconds(left - start) if left is not None else None
    )


# ---- side by side ---------------------------------------------------------------------------------------------


class Line(Struct, frozen=True):
    """One figure, predicted and achieved."""

    what: str
    predicted: float | None
    achieved: float | None
    share: bool = False
    """In percent of the device time; the error is then in points."""

    @property
    def error(self) -> float | None:
        """Predicted over achieved minus 1; of shares: the difference in points. None where either is not known."""
        if self.predicted is None or self.achieved is None:
            return None
        if self.share:
            return self.predicted - self.achieved
        return self.predicted / self.achieved - 1 if self.achieved else None

    @property
    def shown_error(self) -> str:
        """`+4.2%`, or `+1.3 points`."""
        if self.error is None:
            return "-"
        return f"{self.error:+.1f} points" if self.share else f"{self.error:+.1%}"


def set_beside(said: Rehearsal, did: Rehearsal) -> list[Line]:
    """Throughput, latency and the ledger's shares, as predicted and as achieved."""
    out = [
        Line("duration, s", said.report.duration_s, did.report.duration_s),
        Line("output tok/s", said.report.output_tok_s, did.report.output_tok_s),
        Line("goodput, req/s", said.report.goodput_req_s, did.report.goodput_req_s),
    ]
    for name, pick in (("TTFT", _ttft), ("TPOT", _tpot), ("E2E", _e2e)):
        for key in ("mean", "p50", "p90", "p99"):
            values = (getattr(pick(r.report), key) for r in (said, did))
            out.append(Line(f"{name} {key}, ms", *values))
    return out + shares(said.account, did.account)


def shares(said: Account, did: Account, least: float = 0.0005) -> list[Line]:
    """The ledger's shares of all device time in percent; causes below `least` in both are left out."""
    pairs: Sequence[tuple[Cause, float, float]] = [(c, said.total.share(c), did.total.share(c)) for c in Cause]
    return [Line(f"{c.label}, %", 100 * a, 100 * b, share=True) for c, a, b in pairs if max(a, b) >= least]


def _ttft(report: Report) -> Summary:
    return report.ttft_ms


def _tpot(report: Report) -> Summary:
    return report.tpot_ms


def _e2e(report: Report) -> Summary:
    return report.e2e_ms
