"""One workload through one prepared engine, simulated or live: how it was served, and where the device time went."""

import asyncio
import time
from collections.abc import Sequence

from msgspec import Struct, structs

from evener.api import Prepared, brain_config, plan_work, start_engine
from evener.brain import Brain
from evener.engine.request import Request
from evener.execute.base import Engine
from evener.execute.sim.body import Simulator
from evener.execute.sim.traffic import Outcome, SimRequest
from evener.ledger.account import Account
from evener.ledger.ledger import Ledger
from evener.units import NS_PER_S, Nanoseconds, ns
from evener.workload import drive
from evener.workload.offline import EngineClient
from evener.workload.report import Report, Summary, make_report
from evener.workload.requests import TimedRequest
from evener.workload.slo import Slo
from evener.workload.traffic import check_vocabulary

_PATIENCE = 40
"""Twentieths of a second to wait for the last spans."""
NO_SUMMARY = Summary(None, None, None, None)


class Rehearsal(Struct, frozen=True, kw_only=True):
    """What became of a workload. The account covers the run alone, loading and warm-up left out."""

    live: bool
    report: Report
    account: Account


def simulate(prepared: Prepared, requests: Sequence[TimedRequest], slo: Slo | None = None) -> Rehearsal:
    """In virtual time, by the engine's cost model. Nothing is started; the same input gives the same figures.

    The report has no gaps between tokens: only first and last tokens are followed.
    """
    start = Nanoseconds(0)
    ledger = Ledger(prepared.plan, prepared.costs, start=start, work=plan_work(prepared))
    brain = Brain(prepared.plan, prepared.kv_blocks, prepared.costs, brain_config(prepared), journal=ledger)
    timed = sorted(requests, key=lambda r: r.arrival_s)
    traffic = [_simulated(r) for r in timed]
    outcomes = Simulator(brain, prepared.costs, traffic, ledger=ledger).run()
    run = drive.new_run(timed, open_loop=True)
    for request, record, outcome in zip(timed, run.records, outcomes, strict=True):
        fill_record(record, outcome, request.input_tokens)
    run.duration_s = max((r.ended_s for r in run.records), default=0.0)
    report = structs.replace(make_report(run, slo), itl_ms=NO_SUMMARY, tokens_per_chunk=None)
    return Rehearsal(live=False, report=report, account=ledger.account(start, ns(run.duration_s)))


def _simulated(request: TimedRequest) -> SimRequest:
    asked = Request(f"q{request.index}", request.input_tokens, request.output_tokens)
    return SimRequest(asked, ns(request.arrival_s), request.output_tokens)


def fill_record(record: drive.Record, outcome: Outcome, input_tokens: int, start: int = 0) -> None:
    """Write a simulated outcome into a client's record; `start`: the virtual time that counts as 0 s."""
    ended = outcome.ended if outcome.ended is not None else outcome.arrival
    record.sent_s, record.ended_s = (outcome.arrival - start) / NS_PER_S, (ended - start) / NS_PER_S
    record.input_tokens, record.output_tokens = input_tokens, outcome.tokens
    if outcome.finish in ("stop", "length") and outcome.first_token is not None:
        record.failure = None
        record.chunk_s = [(outcome.first_token - start) / NS_PER_S, record.ended_s]
    else:
        record.failure = outcome.finish or "unfinished"


def run_live(
    prepared: Prepared,
    requests: Sequence[TimedRequest],
    warm_up: Sequence[TimedRequest] = (),
    slo: Slo | None = None,
    timeout_s: float = 3600.0,
    on_done: drive.OnDone | None = None,
) -> Rehearsal:
    """With real workers, the load coming from this process (no HTTP). Starts the engine and closes it again.

    Raises InvalidInput for token ids that the model lacks, StartFailed when a worker does not come up.
    """
    check_vocabulary([*requests, *warm_up], prepared.model.vocab)
    return asyncio.run(_run_live(prepared, requests, warm_up, slo, timeout_s, on_done))


async def _run_live(
    prepared: Prepared,
    requests: Sequence[TimedRequest],
    warm_up: Sequence[TimedRequest],
    slo: Slo | None,
    timeout_s: float,
    on_done: drive.OnDone | None,
) -> Rehearsal:
    engine = await start_engine(prepared=prepared)
    try:
        engine.ledger()  # refuses at once where none is kept
        client = EngineClient(engine, timeout_s)
        await drive.open_loop(warm_up, client.send, drive.new_run(warm_up, open_loop=True))
        run = drive.new_run(requests, open_loop=True)
        began = time.monotonic_ns()
        await drive.open_loop(requests, client.send, run, on_done or (lambda record: None))
        ended = time.monotonic_ns()
        account = await _account(engine, Nanoseconds(began), Nanoseconds(ended))
    finally:
        await engine.close()
    return Rehearsal(live=True, report=make_report(run, slo), account=account)


async def _account(engine: Engine, began: Nanoseconds, ended: Nanoseconds) -> Account:
    """Of a window that has just ended: workers report their last batches a moment later."""
    for _ in range(_PATIENCE):
        account = engine.ledger().account(began, ended)
        if all(d.wall_ns == ended - began for d in account.devices.values()):
            break
        await asyncio.sleep(0.05)
    return account
