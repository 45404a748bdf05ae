"""`evener quality`: what a dtype costs in perplexity."""

import json
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from evener.errors import InvalidInput

COLUMNS = ("dtype", "kv_dtype", "perplexity_ratio", "perplexity", "kl", "top1_agreement", "passed")


def quality(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, .gguf file or hub id. Default: the installed SmolLM2.", show_default=False),
    ] = None,
    dtypes: Annotated[
        str, typer.Option(help="Pairs of weights/KV cache, such as int8/bf16; one name means both.")
    ] = "bf16,int8,int8/bf16,int8/fp32,fp32/int8",
    text: Annotated[
        Path | None, typer.Option(help="UTF-8 text.", show_default="the docstrings of evener itself")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens of the text to use.")] = 4096,
    window: Annotated[int, typer.Option(min=2, help="Tokens of context; each window starts afresh.")] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:
    """Perplexity, KL divergence and top-1 agreement of narrower dtypes against fp32; fails beyond 1% of perplexity."""
    from evener.quality import measure_quality

    settings = tuple(_pair(given) for given in dtypes.split(","))
    try:
        content = text.read_text(encoding="utf-8") if text is not None else None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"--text {text} cannot be read as UTF-8: {error}") from error
    found = measure_quality(model, settings=settings, text=content, named=str(text or ""), tokens=tokens, window=window)
    if as_json:
        print(json.dumps(msgspec.to_builtins(found), indent=1))
    else:
        table = Table(title=f"{found[0].text}; fp32 perplexity {found[0].perplexity_fp32:.4g}; {found[0].isa}")
        for column in COLUMNS:
            table.add_column(column)
        for row in found:
            values = (getattr(row, column) for column in COLUMNS)
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in values))
        Console().print(table)
    if not all(row.passed for row in found):
        raise typer.Exit(1)


def _pair(text: str) -> tuple[str, str]:
    dtype, _, kv_dtype = text.strip().partition("/")
    return dtype, kv_dtype or dtype
