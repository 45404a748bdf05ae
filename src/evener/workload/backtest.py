"""The back-test: what a cost model and the simulator say of a run, beside what the run achieved.

The run's arrivals go through the simulator with its plan, limits and policies; output lengths are those that it had.
The run is a recording, or what a server has just served (there only lengths are known).
Times are those of the engine (a request's arrival there, an answer's leaving it), without HTTP; an answer ends when the
engine knows that it has ended, which after an end-of-sequence token is one step later.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from msgspec import Struct, structs

from evener.brain import Brain
from evener.cost.base import CostModel
from evener.errors import InvalidInput
from evener.execute.live.record import Entry
from evener.execute.served import Header, Served, ServedLog
from evener.execute.sim.body import Simulator
from evener.execute.sim.traffic import Failure, SimRequest, SlowDown
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.ledger import EVERYTHING, Ledger
from evener.units import NS_PER_S, Nanoseconds
from evener.workload import drive
from evener.workload.rehearse import NO_SUMMARY, Rehearsal, fill_record
from evener.workload.replay import Replayed, open_recording, recorded_costs, recorded_work
from evener.workload.report import Report, Summary, make_report
from evener.workload.slo import Slo

MOST_LOST = 20.0
"""A device that computed next to nothing in a second is slowed down by no more than this."""


class Traffic(NamedTuple):
    """What a run had to serve."""

    header: Header
    requests: Sequence[Served]
    """In order of arrival."""
    failures: Sequence[Failure]
    around: Sequence[Served] = ()
    """Ran meanwhile, and ended before the others or run still: part of throughput, not of latencies."""


def read_traffic(path: Path, skip: int = 0) -> Traffic:
    """The requests of a recording without the first `skip` (a warm-up), and the workers it lost.

    Those that are skipped and ran meanwhile, and those whose end the recording does not have, are `around`.
    Raises InvalidInput when nothing is left, or the file is no recording.
    """
    log = read_log(path)
    everyone = list(log.requests)
    requests = [one for one in everyone[skip:] if one.ended is not None]
    if not requests:
        cut = f", of the others {len(everyone[skip:])} have no end" if everyone[skip:] else ""
        raise InvalidInput(f"{path} has {len(everyone)} requests, {skip} are skipped{cut}; nothing is left to compare")
    start, last = requests[0].arrived, max(one.ended for one in requests if one.ended is not None)
    around = [one for one in everyone[:skip] if one.ended is None or one.ended > start]
    around += [one for one in everyone[skip:] if one.ended is None and one.arrived < last]
    return Traffic(log.header, requests, [Failure(*lost) for lost in log.lost], around)


def read_log(path: Path) -> ServedLog:
    """All requests of a recording. Raises InvalidInput when the file is no recording."""
    header, kept = open_recording(path)
    log = ServedLog(header)
    for record in kept:
        if isinstance(record, Entry):
            log.step(record.now, record.event, record.commands)
    return log


def achieved(traffic: Traffic, replayed: Replayed, slo: Slo | None = None) -> Rehearsal:
    """What the recorded run did with these requests, from their first arrival to the end of the last."""
    if replayed.ledger is None:
        raise InvalidInput("the recording has no ledger to compare with (see `evener replay` without a cost model)")
    return accounted(traffic, replayed.ledger.account(*period(traffic)), slo)


def accounted(traffic: Traffic, account: Account, slo: Slo | None = None) -> Rehearsal:
    """What a run did with these requests; `account`: of their `period`."""
    start, end = period(traffic)
    run = drive.new_run([], open_loop=True)
    for k, one in enumerate(traffic.requests):
        record = drive.Record(k, one.request.max_tokens, (one.arrived - start) / NS_PER_S)
        record.sent_s, record.ended_s = record.scheduled_s, ((one.ended or end) - start) / NS_PER_S
        # As the simulator tells it: the first token, and the end.
        record.chunk_s = [(one.first - start) / NS_PER_S, record.ended_s] if one.first is not None else []
        record.input_tokens, record.output_tokens = one.request.prompt_len, one.tokens
        record.failure = None if one.finish in ("stop", "length") and one.first is not None else one.finish
        run.records.append(record)
    run.duration_s = (end - start) / NS_PER_S
    report = structs.replace(make_report(run, slo), itl_ms=NO_SUMMARY, tokens_per_chunk=None)
    if traffic.around:
        lives = [(r.first, r.ended, r.tokens) for r in traffic.around]
        report = _with_others(report, _tokens_within(lives, start, end))
    return Rehearsal(live=True, report=report, account=account)


def predicted(
    traffic: Traffic, costs: CostModel, slo: Slo | None = None, slow_downs: Sequence[SlowDown] = ()
) -> Rehearsal:
    """The same requests at the same times through the simulator, in which batches take what these costs say.

    What is decided is decided with the costs that the run had, as it was there. `slow_downs`: what cannot be known
    beforehand, as `others_took` finds it; times after the first arrival.
    """
    header = traffic.header
    start, end = period(traffic)
    everyone = sorted([*traffic.requests, *traffic.around], key=lambda one: one.arrived)
    zero = everyone[0].arrived
    before = start - zero
    known = recorded_costs(header)
    ledger = Ledger(header.plan, known, start=Nanoseconds(0), work=recorded_work(header), keep=EVERYTHING)
    brain = Brain(header.plan, header.kv_blocks, known, header.brain, journal=ledger)
    around = {id(one) for one in traffic.around}
    todo = [_again(one, zero, end if id(one) in around else None, header.brain.block_tokens) for one in everyone]
    failures = [Failure(f.device, Nanoseconds(max(0, f.at - zero))) for f in traffic.failures]
    slow = [SlowDown(s.device, Nanoseconds(s.at + before), s.factor) for s in slow_downs]
    outcomes = Simulator(brain, costs, todo, failures, slow_downs=slow, ledger=ledger).run()
    run = drive.new_run([], open_loop=True)
    for one, outcome in zip(everyone, outcomes, strict=True):
        if id(one) not in around:
            scheduled = (outcome.arrival - before) / NS_PER_S
            record = drive.Record(len(run.records), one.request.max_tokens, scheduled)
            fill_record(record, outcome, one.request.prompt_len, start=before)
            run.records.append(record)
    run.duration_s = max(r.ended_s for r in run.records)
    report = structs.replace(make_report(run, slo), itl_ms=NO_SUMMARY, tokens_per_chunk=None)
    until = Nanoseconds(before + round(run.duration_s * NS_PER_S))
    if around:
        beside = [o for one, o in zip(everyone, outcomes, strict=True) if id(one) in around]
        lives = [(o.first_token, o.ended, o.tokens) for o in beside]
        report = _with_others(report, _tokens_within(lives, Nanoseconds(before), until))
    return Rehearsal(live=False, report=report, account=ledger.account(Nanoseconds(before), until))


def _tokens_within(
    lives: Sequence[tuple[Nanoseconds | None, Nanoseconds | None, int]], start: Nanoseconds, end: Nanoseconds
) -> float:
    """Tokens that came in [start, end) of requests with (first token, end, tokens); between these they come evenly."""
    tokens = 0.0
    for first, ended, count in lives:
        if first is not None:
            last = ended if ended is not None else end
            tokens += count * max(0, min(end, last) - max(start, first)) / max(1, last - first)
    return tokens


def _with_others(report: Report, tokens: float) -> Report:
    """With the output tokens of those around in the throughput."""
    more = tokens / report.duration_s if report.duration_s else 0.0
    return structs.replace(report, output_tok_s=report.output_tok_s + more, total_tok_s=report.total_tok_s + more)


def others_took(traffic: Traffic, replayed: Replayed) -> list[SlowDown]:
    """How much longer each device took for its work because others had its cores, second by second.

    A prediction with these tells the model's own error apart from what nobody could predict.
    """
    assert replayed.ledger is not None, "without spans nobody knows"
    start, end = period(traffic)
    out: list[SlowDown] = []
    before: dict[str, float] = {}
    for at in range(start, end, NS_PER_S):
        account = replayed.ledger.account(Nanoseconds(at), Nanoseconds(min(end, at + NS_PER_S)))
        for slow in others_took_on_average(account, Nanoseconds(at - start)):
            if slow.factor != before.get(slow.device, 1.0):
                out.append(slow)
                before[slow.device] = slow.factor
    return out


def others_took_on_average(account: Account, at: Nanoseconds) -> list[SlowDown]:
    """The same over a whole account, in force from `at` on.

    The ranks of a stage lose their cores in turns and wait for each other: each takes longer by what all of them lost.
    """
    out = []
    for stage in account.stages.values():
        lost = stage.causes[Cause.CONTENDED.label]
        for name in stage.devices:
            compute = account.devices[name].compute_s
            out.append(SlowDown(name, at, min(MOST_LOST, 1 + lost / compute) if compute else 1.0))
    return out


def period(traffic: Traffic) -> tuple[Nanoseconds, Nanoseconds]:
    """From the first arrival to the end of the last request, without those around."""
    start = traffic.requests[0].arrived
    return start, max([one.ended for one in traffic.requests if one.ended is not None], default=start)


def _again(one: Served, zero: Nanoseconds, until: Nanoseconds | None, block_tokens: int) -> SimRequest:
    """The brain must not see what stop strings did; what a client's leaving did, happens at the same time.

    `until`: when a request leaves whose end is not known.
    """
    length = one.tokens if one.finish == "stop" else one.request.max_tokens
    left = one.cancelled if one.finish == "cancelled" else until if one.ended is None else None
    request = one.request
    if one.cached and request.prompt is None and request.block_keys is None:
        # Only lengths are known: what was found in the prefix cache is taken to be one beginning that all have.
        request = structs.replace(request, block_keys=list(range(one.cached // block_tokens)))
    return SimRequest(
        request, Nanoseconds(one.arrived - zero), length, Nanoseconds(left - zero) if left is not None else None
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
        out += _latency(name, pick(said.report), pick(did.report), ("mean", "p50", "p90", "p99"))
    return out + shares(said.account, did.account)


def set_beside_in_short(said: Rehearsal, did: Rehearsal, also: Sequence[Rehearsal] = ()) -> list[Line]:
    """The same without what most do not ask for; with the causes that others lost time to, so that lines match."""
    out = [Line("output tok/s", said.report.output_tok_s, did.report.output_tok_s)]
    for name, pick in (("TTFT", _ttft), ("TPOT", _tpot)):
        out += _latency(name, pick(said.report), pick(did.report), ("mean", "p50", "p90"))
    return out + shares(said.account, did.account, also=[r.account for r in also])


def _latency(name: str, said: Summary, did: Summary, keys: Sequence[str]) -> list[Line]:
    return [Line(f"{name} {key}, ms", getattr(said, key), getattr(did, key)) for key in keys]


def shares(said: Account, did: Account, least: float = 0.0005, also: Sequence[Account] = ()) -> list[Line]:
    """The ledger's shares of all device time in percent; causes below `least` in all accounts are left out."""
    seen = [c for c in Cause if max(a.total.share(c) for a in (said, did, *also)) >= least]
    return [Line(f"{c.label}, %", 100 * said.total.share(c), 100 * did.total.share(c), share=True) for c in seen]


def _ttft(report: Report) -> Summary:
    return report.ttft_ms


def _tpot(report: Report) -> Summary:
    return report.tpot_ms


def _e2e(report: Report) -> Summary:
    return report.e2e_ms
