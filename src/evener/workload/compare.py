"""The same traffic through several plans and policies, live or simulated: figures and ledgers side by side."""

from collections.abc import Callable, Sequence
from statistics import median_low

import numpy as np
from msgspec import Struct, structs

from evener.api import EngineOptions, Prepared, describe, prepare
from evener.errors import InvalidInput
from evener.execute.sim.figures import SimReport
from evener.ledger.account import Account
from evener.ledger.finding import hints_of
from evener.ledger.verdict import Verdict, verdict
from evener.model.source import open_model
from evener.workload.rehearse import Rehearsal, run_live, simulate
from evener.workload.report import Report
from evener.workload.requests import Prompts, TimedRequest, TokenIds
from evener.workload.slo import Slo
from evener.workload.spec import Arrivals
from evener.workload.traffic import check_fits

Progress = Callable[[str], None]


class Case(Struct, frozen=True):
    """One engine of a comparison."""

    name: str
    options: EngineOptions
    said: frozenset[str] = frozenset()
    """Options that were given, be it with their defaults."""


class Compared(Struct, frozen=True, kw_only=True):
    """One case and how it did."""

    name: str
    live: bool
    plan: str
    """Name of the plan."""
    layout: tuple[str, ...]
    """One line per shard."""
    policy: str
    router: str
    report: Report | SimReport
    account: Account
    verdict: Verdict
    output_tok_s: tuple[float, ...]
    """Of every round; the report, the account and the verdict are of the round with the median throughput."""


def requests_of(arrivals: Arrivals, prompts: Prompts | None = None, seed: int = 0) -> list[TimedRequest]:
    """Requests with random token ids as prompts, so that none finds another's prefix."""
    rng = np.random.default_rng(seed)
    prompts = prompts or TokenIds()
    return [
        TimedRequest(k, row.arrival_s, prompts.draw(row.input_tokens, rng), row.input_tokens, row.output_tokens)
        for k, row in enumerate(arrivals.trace.rows)
    ]


def warm_up_of(requests: Sequence[TimedRequest], n: int, seed: int = 1) -> list[TimedRequest]:
    """`n` requests as long as the first ones, all at once, with other prompts and at most 8 output tokens."""
    rng = np.random.default_rng(seed)
    return [
        structs.replace(
            r, arrival_s=0.0, prompt=TokenIds().draw(r.input_tokens, rng), output_tokens=min(8, r.output_tokens)
        )
        for r in requests[:n]
    ]


def prepare_cases(cases: Sequence[Case], requests: Sequence[TimedRequest]) -> list[Prepared]:
    """Check every case before the first one runs. Raises an InvalidInput that names the case."""
    if not cases:
        raise InvalidInput("there is nothing to compare; give at least one case, like --case 'pipeline: -pp 2'")
    sources: dict[str | None, object] = {}
    out = []
    for case in cases:
        try:
            if not case.options.ledger:
                raise InvalidInput("ledger=False leaves nothing to set side by side; leave out --no-ledger")
            if "max_queue" in case.said:
                raise InvalidInput("a comparison serves every request, however many wait; leave out --max-queue")
            model = case.options.model
            if model not in sources:
                sources[model] = open_model(model)
            # Nobody is refused for want of room in the queue: a comparison must serve the same requests.
            options = structs.replace(case.options, max_queue=max(case.options.max_queue, len(requests)))
            prepared = prepare(options, sources[model])  # type: ignore[arg-type]
            check_fits(list(requests), prepared.max_model_len)
        except InvalidInput as error:
            raise InvalidInput(f"case {case.name!r}: {error.message}") from error
        out.append(prepared)
    return out


def compare(
    cases: Sequence[Case],
    requests: Sequence[TimedRequest],
    *,
    live: bool = False,
    rounds: int = 1,
    warm_up: Sequence[TimedRequest] = (),
    slo: Slo | None = None,
    progress: Progress = lambda text: None,
) -> list[Compared]:
    """Run every case on these requests; live ones in alternation, `rounds` times, after an unmeasured `warm_up`.

    Raises an InvalidInput that names the case before anything runs.
    """
    if rounds < 1:
        raise InvalidInput(f"rounds={rounds} runs nothing; it must be at least 1")
    if rounds > 1 and not live:
        raise InvalidInput(f"rounds={rounds}: a simulation repeats itself exactly; leave it out, or add --live")
    prepared = prepare_cases(cases, requests)
    done: list[list[Rehearsal]] = [[] for _ in cases]
    for k in range(rounds):
        order = [*range(k % len(cases), len(cases)), *range(k % len(cases))]
        for at in order:
            progress(f"{cases[at].name} ({'live' if live else 'simulated'}, round {k + 1} of {rounds})")
            one = prepared[at]
            done[at].append(run_live(one, requests, warm_up, slo) if live else simulate(one, requests, slo))
    return [_compared(*row) for row in zip(cases, prepared, done, strict=True)]


def _compared(case: Case, prepared: Prepared, runs: list[Rehearsal]) -> Compared:
    speeds = [r.report.output_tok_s for r in runs]
    typical = runs[speeds.index(median_low(speeds))]
    given = prepared.options
    return Compared(
        name=case.name, live=typical.live, plan=prepared.plan.name, layout=tuple(describe(prepared.plan)),
        policy=prepared.options.policy, router=prepared.options.router, report=typical.report,
        account=typical.account, output_tok_s=tuple(speeds),
        verdict=verdict(typical.account, hints_of(prepared.model, given.kv_dtype or given.dtype, given.max_num_seqs)),
    )  # fmt: skip
