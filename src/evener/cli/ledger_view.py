"""An account for a terminal: one coloured bar per device, a legend, and the verdict in words below."""

from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from evener.ledger.causes import Cause
from evener.ledger.colours import COLOURS

BLOCK = "█"
LEAST = 0.0005
"""Causes below this share of all device-seconds are not in the legend."""
COLOUR = {cause.label: COLOURS[cause] for cause in Cause}
ORDER = [cause.label for cause in Cause]


def account_view(view: dict[str, Any], title: str, width: int) -> RenderableType:
    """What /ledger answered, for a terminal `width` columns wide."""
    names = list(view["devices"])
    longest = max(len(name) for name in names)
    bar_width = max(20, width - longest - 34)
    table = Table(box=None, pad_edge=False, expand=False)
    for column, justify in (
        ("device", "left"),
        ("", "left"),
        ("useful", "right"),
        ("of peak", "right"),
        ("wall", "right"),
    ):
        table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
    rows = [(name, view["devices"][name]) for name in names]
    if len(rows) > 1:
        rows.append(("all", view["total"]))
    for name, use in rows:
        useful = share(use, "prefill") + share(use, "decode")
        peak = use["achieved_over_peak"]
        table.add_row(
            name, bar(use, bar_width), f"{useful:.1%}", "-" if peak is None else f"{peak:.0%}", f"{use['wall_s']:.1f} s"
        )
    return Group(
        Text(title, style="bold"), table, Text(), legend(view["total"], width), Text(), *verdict_lines(view["verdict"])
    )


def bar(use: dict[str, Any], width: int) -> Text:
    """Causes as stretches of one bar; each gets cells by its share, largest remainders first."""
    wall = use["wall_s"]
    if wall <= 0:
        return Text("nothing yet".ljust(width), style="dim")
    exact = [use["causes"].get(label, 0.0) / wall * width for label in ORDER]
    cells = [int(x) for x in exact]
    for k in sorted(range(len(exact)), key=lambda k: cells[k] - exact[k])[: width - sum(cells)]:
        cells[k] += 1
    text = Text()
    for label, count in zip(ORDER, cells, strict=True):
        text.append(BLOCK * count, style=COLOUR[label])
    return text


def legend(total: dict[str, Any], width: int) -> RenderableType:
    """Colour, cause and share of all device-seconds, in columns."""
    shown = [label for label in ORDER if share(total, label) >= LEAST]
    columns = max(1, width // 26)
    grid = Table.grid(padding=(0, 3))
    entries = [
        Text.assemble((BLOCK * 2, COLOUR[label]), f" {label} ", (f"{share(total, label):.1%}", "bold"))
        for label in shown
    ]
    for at in range(0, len(entries), columns):
        grid.add_row(*entries[at : at + columns])
    return grid


def verdict_lines(verdict: dict[str, Any]) -> list[RenderableType]:
    """The findings, the largest first, and what bounds the deployment."""
    lines: list[RenderableType] = []
    for found in verdict["findings"]:
        head = f"[bold]{escape(found['where'])}[/bold] loses [bold]{found['share']:.0%}[/bold] to "
        colour = COLOUR[found["cause"]]
        lines.append(
            Text.from_markup(
                f"[{colour}]{BLOCK}[/{colour}] {head}{found['cause']}: {escape(found['evidence'])}. "
                f"[green]{escape(found['remedy'])}.[/green]"
            )
        )
    if not lines:
        lines.append(Text("Nothing large is lost."))
    lines.append(Text(verdict["bound"], style="dim"))
    return lines


def request_view(request: dict[str, Any], width: int) -> RenderableType:
    """Where one request's latency went."""
    state = "took" if request["ended"] else "runs since"
    title = (
        f"{request['request_id']}: {request['prompt_tokens']} tokens in, "
        f"{'' if request['output_tokens'] is None else str(request['output_tokens']) + ' out, '}"
        f"{state} {request['latency_s']:.3f} s"
    )
    for name in ("preempted", "moved"):
        if request[name]:
            title += f", {name} {request[name]}x"
    table = Table(box=None, pad_edge=False)
    for column in ("phase", "replica", "seconds", "its devices meanwhile"):
        table.add_column(column, justify="right" if column == "seconds" else "left", no_wrap=True)
    for phase in request["phases"]:
        seconds = phase["seconds"]
        known = sum(phase["causes"].values())
        meanwhile = bar({"wall_s": known, "causes": phase["causes"]}, max(20, width - 40)) if known else Text("-")
        table.add_row(phase["name"], str(phase["replica"]), f"{seconds:.3f}", meanwhile)
    sums: dict[str, float] = {}
    for phase in request["phases"]:
        for label, seconds in phase["causes"].items():
            sums[label] = sums.get(label, 0.0) + seconds
    total = {"wall_s": sum(sums.values()), "causes": sums}
    return Group(Text(title, style="bold"), table, Text(), legend(total, width))


def share(use: dict[str, Any], label: str) -> float:
    """Of the wall time, 0 to 1."""
    return use["causes"].get(label, 0.0) / use["wall_s"] if use["wall_s"] > 0 else 0.0
