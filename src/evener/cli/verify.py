"""`evener verify`: is this plan the same model?"""

import json
import sys
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from evener.api import EngineOptions
from evener.cli.engine_options import with_engine_options


@with_engine_options
def verify(
    options: EngineOptions,
    requests: Annotated[int, typer.Option(min=1, help="Prompts.")] = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Output tokens of each.")] = 64,
    longest: Annotated[int, typer.Option(min=1, help="Longest prompt, tokens.")] = 160,
    seed: Annotated[int, typer.Option(help="Of the random prompts.")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Compare a plan with transformers through the live path: chunks, mixed batches, prefix hits, preemption."""
    from evener.verify import verify as run

    # What verification sets itself stays free unless it was said.
    said = {
        name: value
        for name in EngineOptions.__struct_fields__
        if (value := getattr(options, name)) != getattr(EngineOptions(), name)
    }
    verdict = run(said, requests=requests, tokens=tokens, longest=longest, seed=seed)
    if as_json:
        print(json.dumps(msgspec.to_builtins(verdict), indent=1))
    else:
        table = Table(show_header=False)
        for name, value in msgspec.to_builtins(verdict).items():
            table.add_row(name, f"{value:.3g}" if isinstance(value, float) else str(value))
        Console().print(table)
        print("equal to the reference" if verdict.passed else "NOT equal to the reference", file=sys.stderr)
    if not verdict.passed:
        raise typer.Exit(1)
