"""`evener replay`: a recorded run again, decision by decision, or as the cost model would have predicted it."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from evener.cli.beside import print_lines
from evener.cli.paths import check_picture
from evener.cost.base import CostModel
from evener.cost.rates import bind, default_profile
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidInput
from evener.execute.served import Header
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.verdict import Hints, verdict
from evener.profile.store import load_profile
from evener.workload.backtest import achieved, others_took, predicted, read_traffic, set_beside
from evener.workload.bars import plot_ledgers
from evener.workload.calibrate import observe
from evener.workload.replay import recorded_costs
from evener.workload.replay import replay as run_again
from evener.workload.slo import parse_slo

MODELS = ("recorded", "default", "profile", "fitted")


def replay(
    record: Annotated[Path, typer.Argument(help="File that --record wrote.", show_default=False)],
    with_cost_model: Annotated[
        str | None,
        typer.Option(
            help="Predict the run in the simulator: recorded (the model it ran with), default (assumed rates), profile "
            "(this host, measured) or fitted (to spans).",
            show_default=False,
        ),
    ] = None,
    fit_on: Annotated[
        list[Path] | None,
        typer.Option(help="fitted: a recording to fit on, of the same plan. Repeatable.", show_default="RECORD"),
    ] = None,
    skip: Annotated[int, typer.Option(min=0, help="Prediction: leave out so many first requests, a warm-up.")] = 0,
    with_contention: Annotated[
        bool,
        typer.Option("--with-contention", help="Prediction: take as known what other processes took from the devices."),
    ] = False,
    slo: Annotated[str | None, typer.Option(help="Goodput bounds, as in ttft=200ms,tpot=50ms,e2e=10s.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ledgers: a .png, .svg or .pdf file.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Replay a recorded run: the same events must give the same commands, its spans the same ledger.

    Exits with 1 at the first command that differs. With a cost model, it sets beside what happened what the simulator
    predicts for the same arrivals.
    """
    check_picture(plot, "--plot")
    bounds = parse_slo(slo) if slo is not None else None
    if with_cost_model is None and (fit_on or skip or slo is not None or with_contention):
        raise InvalidInput(
            "--fit-on, --skip, --slo and --with-contention are for a prediction; give --with-cost-model too"
        )
    if fit_on and with_cost_model != "fitted":
        raise InvalidInput(f"--fit-on is for --with-cost-model fitted, not {with_cost_model}")
    done = run_again(record)
    figures: dict[str, Any] = {"steps": done.steps, "batches": done.batches, "spans": done.spans}
    figures["difference"] = msgspec.to_builtins(done.difference)
    if done.difference is not None:
        _say(json, figures, f"NOT the same decisions at {done.difference.text}")
        raise typer.Exit(1)
    same = f"the same decisions in all {done.steps} steps ({done.batches} batches, {done.spans} spans)"
    if with_cost_model is None:
        account = done.ledger.account() if done.ledger is not None else None
        figures |= {"account": msgspec.to_builtins(account)}
        _say(json, figures, same)
        if account is not None and not json:
            print_account(account, done.header.hints)
        if plot is not None:
            _draw([(record.name, account)] if account is not None else [], plot, "Where every device-second went")
        return
    traffic = read_traffic(record, skip)
    costs, note = _costs(with_cost_model, traffic.header, fit_on or [record], record)
    did = achieved(traffic, done, bounds)
    said = predicted(traffic, costs, bounds, others_took(traffic, done) if with_contention else ())
    lines = set_beside(said, did)
    table = [{"what": x.what, "predicted": x.predicted, "achieved": x.achieved, "error": x.error} for x in lines]
    figures |= {"cost_model": note, "requests": len(traffic.requests), "figures": table}
    figures |= {"predicted": msgspec.to_builtins(said), "achieved": msgspec.to_builtins(did)}
    _say(json, figures, f"{same}; {len(traffic.requests)} requests predicted with {note}")
    if not json:
        print_lines(lines)
    if plot is not None:
        _draw([("predicted", said.account), ("achieved", did.account)], plot, "Predicted and achieved")


def _say(json: bool, figures: dict[str, Any], text: str) -> None:
    if json:
        print(msgspec.json.format(msgspec.json.encode(figures), indent=1).decode())
    else:
        print(text)


def _costs(kind: str, header: Header, fit_on: Sequence[Path], record: Path) -> tuple[CostModel, str]:
    """The cost model to predict with, and what to call it."""
    if kind not in MODELS:
        raise InvalidInput(f"--with-cost-model {kind!r} is not one of {', '.join(MODELS)}")
    if kind == "recorded":
        return recorded_costs(header), "the cost model of the run"
    if kind == "fitted":
        fitted = observe(*fit_on).fit(header.costs["version"] + 1)
        if fitted.plan != header.plan:
            raise InvalidInput(f"--fit-on {fit_on[0]} ran another plan ({fitted.plan.name}); fit on a run of the same")
        error = f", {fitted.error():.1%} off on spans it did not see" if fitted.error() is not None else ""
        own = " (itself: give --fit-on for a test)" if record in fit_on else ""
        return fitted, f"a model fitted on {', '.join(path.name for path in fit_on)}{own}{error}"
    devices = header.cluster.devices
    profile = default_profile(devices) if kind == "default" else load_profile(header.cluster)
    if profile is None:
        names = " ".join(d.name for d in devices)
        raise InvalidInput(f"{names} were not measured here; run `evener devices --devices {names}` first")
    costs = RooflineCostModel(
        header.model, header.plan, bind(profile, devices), dtype=header.costs["dtype"],
        kv_dtype=header.kv_dtype, links=header.cluster.links,
    )  # fmt: skip
    return costs, "assumed rates" if kind == "default" else "this host's measured profile"


def _draw(ledgers: list[tuple[str, Account]], path: Path, title: str) -> None:
    if not ledgers:
        raise InvalidInput("the recording has no spans to draw; record with the ledger on")
    plot_ledgers(ledgers, path, title)
    print(f"evener: wrote {path}", file=sys.stderr)


def print_account(account: Account, hints: Hints) -> None:
    """One column per device, shares in percent, and the verdict."""
    shown = Table("%", *account.devices, box=None)
    for column in shown.columns[1:]:
        column.justify = "right"
    for cause in Cause:
        if account.total.causes_ns[cause]:
            shown.add_row(cause.label, *(f"{100 * d.share(cause):.1f}" for d in account.devices.values()))
    console = Console()
    console.print(shown)
    for line in verdict(account, hints).text():
        console.print(line, markup=False, highlight=False)
