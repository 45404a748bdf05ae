"""`evener plan --check`: what the simulator predicts for a plan beside what a server did with it, on the same traffic;
with --what-if also what another plan would have done."""

from pathlib import Path
from typing import Any

import msgspec
import typer
from msgspec import structs
from rich.console import Console

from evener.api import describe
from evener.cli.beside import print_lines
from evener.cli.served import Run, read_run
from evener.ledger.causes import Cause
from evener.plan.load import load_plan
from evener.workload.backtest import Line, accounted, predicted, set_beside_in_short
from evener.workload.rehearse import Rehearsal
from evener.workload.replay import recorded_costs, recorded_profile
from evener.workload.whatif import with_plan

NOTICEABLE = 0.05
"""A share that is worth a sentence."""


def check(
    source: str, window: float | None, what_if: Path | None, contention: bool, api_key: str | None, as_json: bool
) -> None:
    """Read the run, simulate it, print both. `contention`: what others took from the devices is taken as known."""
    with Console(stderr=True).status("asking", spinner="line") as status:
        run = read_run(source, window, api_key)
        traffic = run.traffic
        status.update(f"simulating {len(traffic.requests)} requests")
        took = run.took if contention else ()
        said = predicted(traffic, recorded_costs(traffic.header), slow_downs=took)
        did = accounted(traffic, run.account)
        other = None
        if what_if is not None:
            status.update(f"simulating {what_if.name}")
            plan = structs.replace(load_plan(what_if, traffic.header.model), name=what_if.name)
            header = with_plan(traffic.header, plan)
            # What others take stays with the device.
            other = predicted(traffic._replace(header=header), recorded_costs(header), slow_downs=took)
    lines = set_beside_in_short(said, did, [other] if other is not None else [])
    others = set_beside_in_short(other, did, [said]) if other is not None else []
    remarks = notes(run, said, did, other, contention)
    if as_json:
        figures = _figures(run, said, did, other, lines, others, remarks)
        typer.echo(msgspec.json.format(msgspec.json.encode(figures), indent=1))
        return
    console = Console()

    def say(text: str, style: str | None = None) -> None:
        console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)

    say(_headline(run), "bold")
    for line in describe(traffic.header.plan):
        say(f"  {line}")
    say(_measured_on(run, did))
    print_lines(lines, others, what_if.name if what_if is not None else "")
    for remark in remarks:
        say(remark)


def _headline(run: Run) -> str:
    header = run.traffic.header
    formats = f"{header.costs['dtype']} with {header.kv_dtype} KV"
    return f"{run.source}: plan {header.plan.name}, {run.model} in {formats}, policy {header.brain.policy}"


def _measured_on(run: Run, did: Rehearsal) -> str:
    report = did.report
    text = f"{report.requests} requests in {report.duration_s:.1f} s"
    if report.failed:
        text += f" ({report.failed} failed or cancelled: {', '.join(report.failures)})"
    text += (
        f", {report.input_tokens / report.completed:.0f} tokens in and {report.output_tokens / report.completed:.0f} "
    )
    text += "out on average"
    if run.traffic.around:
        text += f"; {len(run.traffic.around)} more ran beside them, are simulated, and count for throughput alone"
    return f"{text}. Times are the engine's, without HTTP."


def notes(run: Run, said: Rehearsal, did: Rehearsal, other: Rehearsal | None, contention: bool) -> list[str]:
    """What one must know to read the errors."""
    out = []
    if run.cut:
        out.append(f"The window is cut: {run.cut}.")
    contended = did.account.total.share(Cause.CONTENDED)
    if contended - said.account.total.share(Cause.CONTENDED) >= NOTICEABLE:
        text = f"Other processes took {contended:.0%} of the device time (contended)"
        known = "the prediction takes it as known and counts it with the work it slowed"
        out.append(
            f"{text}: {known}."
            if contention
            else f"{text}, which no prediction knows; --with-contention takes it as known."
        )
    if recorded_profile(run.traffic.header).source == "default":
        out.append(
            "The server's cost model assumes the devices' speeds: run `evener devices` and start the server again."
        )
    prompts = sum(r.request.prompt_len for r in run.traffic.requests)
    cached = sum(r.cached for r in run.traffic.requests)
    if cached >= NOTICEABLE * prompts:
        out.append(
            f"{cached / prompts:.0%} of the prompt tokens were found in the prefix cache; the simulation, which knows "
            "lengths alone, takes them for one common beginning."
        )
    if other is not None and other.report.failed > said.report.failed:
        reasons = ", ".join(other.report.failures)
        out.append(f"With the other plan {other.report.failed} requests fail ({reasons}).")
    return out


def _figures(
    run: Run,
    said: Rehearsal,
    did: Rehearsal,
    other: Rehearsal | None,
    lines: list[Line],
    others: list[Line],
    notes: list[str],
) -> dict[str, Any]:
    header = run.traffic.header
    what_if = {x.what: x.predicted for x in others}
    return {
        "source": run.source,
        "model": run.model,
        "dtype": header.costs["dtype"],
        "kv_dtype": header.kv_dtype,
        "policy": header.brain.policy,
        "plan": header.plan,
        "layout": describe(header.plan),
        "requests": len(run.traffic.requests),
        "around": len(run.traffic.around),
        "cut": run.cut,
        "notes": notes,
        "figures": [
            {"what": x.what, "predicted": x.predicted, "achieved": x.achieved, "error": x.error}
            | ({"what_if": what_if.get(x.what)} if other is not None else {})
            for x in lines
        ],
        "predicted": said,
        "achieved": did,
        "what_if": other,
    }
