"""Predicted beside achieved, as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from evener.workload.backtest import Line


def print_lines(lines: Sequence[Line], others: Sequence[Line] = (), name: str = "") -> None:
    """Predicted, achieved, error; `others`: the same lines for the plan `name`, and their distance to the predicted."""
    shown = Table("", "predicted", "achieved", "error", box=None)
    if others:
        shown.add_column(name, overflow="fold")
        shown.add_column("change")
    for column in shown.columns[1:]:
        column.justify = "right"
    for k, line in enumerate(lines):
        cells = [_figure(line.predicted), _figure(line.achieved), line.shown_error]
        if others:
            change = Line(line.what, others[k].predicted, line.predicted, line.share)
            cells += [_figure(others[k].predicted), change.shown_error]
        shown.add_row(line.what, *cells)
    Console().print(shown)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
