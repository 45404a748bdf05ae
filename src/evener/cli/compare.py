"""`evener compare`: the same traffic through several plans and policies, figures and ledgers side by side."""

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from evener.api import EngineOptions
from evener.cli.cases import read_cases
from evener.cli.elsewhere import compare_elsewhere
from evener.cli.engine_options import said, with_engine_options
from evener.cli.paths import check_picture
from evener.errors import InvalidInput
from evener.workload.bars import plot_ledgers
from evener.workload.compare import Case, Compared, requests_of, warm_up_of
from evener.workload.compare import compare as run_cases
from evener.workload.slo import parse_slo
from evener.workload.spec import parse_traffic
from evener.workload.table import table


@with_engine_options
def compare(
    options: EngineOptions,
    ctx: typer.Context,
    case: Annotated[
        list[str] | None,
        typer.Option(
            help="'NAME: FLAGS', flags as of this command ('pipeline: -pp 2'). Repeatable.", show_default="one"
        ),
    ] = None,
    cases: Annotated[Path | None, typer.Option(help="The same as a YAML mapping of names to flags.")] = None,
    cluster: Annotated[
        str | None, typer.Option(help="Devices that need not be here (YAML, docs/clusters.md), simulated.")
    ] = None,
    traffic: Annotated[
        str, typer.Option(help="A trace file, or rate=4,in=lognormal:180:0.8,out=128,requests=300; trace=FILE,scale=2.")
    ] = "requests=64",
    live: Annotated[bool, typer.Option("--live", help="Start each engine in turn instead of simulating it.")] = False,
    rounds: Annotated[int, typer.Option(min=1, help="Live: how often, in alternation; the median run is shown.")] = 1,
    warm_up: Annotated[int, typer.Option(min=0, help="Live: this many requests first, unmeasured.")] = 4,
    slo: Annotated[str | None, typer.Option(help="Goodput bounds, as in ttft=200ms,tpot=50ms,e2e=10s.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the ledgers: a .png, .svg or .pdf file.")] = None,
    title: Annotated[str, typer.Option(help="Of the picture.")] = "Where every device-second goes",
    json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
) -> None:
    """Run the same traffic through several plans and policies, simulated or live, and set the results side by side.

    Flags outside --case hold for all cases.
    """
    bounds = parse_slo(slo) if slo is not None else None
    given = {name for name in said(ctx) if name in EngineOptions.__struct_fields__}
    listed = read_cases(case or (), cases, options, given) or [Case("as given", options, frozenset(given))]
    check_picture(plot, "--plot")

    def progress(text: str) -> None:
        print(f"evener: {text}", file=sys.stderr, flush=True)

    if cluster is not None:
        if live:
            raise InvalidInput("--live starts engines on this host; leave out --cluster, or --live")
        if rounds != 1:
            raise InvalidInput(f"--rounds {rounds}: a simulation repeats itself exactly; leave it out, or add --live")
        results = compare_elsewhere(listed, cluster, traffic, slo, progress)
    else:
        requests = requests_of(parse_traffic(traffic))
        results = run_cases(
            listed, requests, live=live, rounds=rounds, warm_up=warm_up_of(requests, warm_up), slo=bounds,
            progress=progress,
        )  # fmt: skip
    if json:
        print(msgspec.json.format(msgspec.json.encode(_figures(results, traffic, slo)), indent=1).decode())
    else:
        print_table(results)
    if plot is not None:
        how = "live" if live else "simulated"
        named = [(f"{r.name}: {r.report.output_tok_s:.0f} output tok/s", r.account) for r in results]
        plot_ledgers(named, plot, title, f"evener compare, {how}; traffic {traffic}")
        print(f"evener: wrote {plot}", file=sys.stderr)


def _figures(results: list[Compared], traffic: str, slo: str | None) -> dict[str, Any]:
    return {"traffic": traffic, "slo": slo, "cases": [msgspec.to_builtins(r) for r in results]}


def print_table(results: list[Compared]) -> None:
    """One column per case, and what each one's ledger says in words."""
    shown = Table("", *(escape(r.name) for r in results), box=None)
    shown.columns[0].no_wrap = True
    for column in shown.columns[1:]:
        column.justify, column.overflow = "right", "fold"
    for what, cells in table(results):
        style = "bold" if what in ("output tok/s", "useful, %") else ""
        shown.add_row(what, *map(escape, cells), style=style)
    console = Console()
    console.print(shown)
    for result in results:
        console.print(f"\n[bold]{escape(result.name)}[/bold]")
        for line in result.verdict.text():
            console.print(Padding(Text(line), (0, 0, 0, 2)))
