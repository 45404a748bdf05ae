"""`evener verify`: is this plan the same model?"""

import json
import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from evener.api import EngineOptions
from evener.cli.engine_options import said, with_engine_options


@with_engine_options
def verify(
    options: EngineOptions,
    ctx: typer.Context,
    requests: Annotated[int, typer.Option(min=1, help="Prompts.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each.")] = 64,
    longest: Annotated[int, typer.Option(min=1, help="Longest prompt, tokens.")] = 160,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare a plan with transformers through the live path: chunks, mixed batches, prefix hits, preemption."""
    from evener.verify import verify as run

    # What verification sets itself stays free unless it was said, be it the default.
    given = {name: getattr(options, name) for name in EngineOptions.__struct_fields__ if name in said(ctx)}
    verdict = run(given, requests=requests, tokens=tokens, longest=longest, seed=seed)
    if as_json:
        print(json.dumps(msgspec.to_builtins(verdict), indent=1))
    else:
        table = Table(show_header=False)
        for name, value in msgspec.to_builtins(verdict).items():
            table.add_row(name, _shown(value))
        Console().print(table)
        print("equal to the reference" if verdict.equal else "NOT equal to the reference", file=sys.stderr)
        if verdict.not_seen:
            what = ", ".join(name.replace("_", " ") for name in verdict.not_seen)
            print(f"not covered by this run: {what}; raise --requests, --tokens or --longest", file=sys.stderr)
    if not verdict.passed:
        raise typer.Exit(1)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}"
    return ", ".join(map(str, value)) or "-" if isinstance(value, list | tuple) else str(value)
