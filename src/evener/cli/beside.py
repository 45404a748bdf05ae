"""Predicted beside achieved, as a table."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from evener.workload.backtest import Line


def print_lines(lines: Sequence[Line], others: Sequence[Line] = (), name: str = "") -> None:
    """Predicted, achieved, error; `others`: the same figures under the plan `name`, beside those that are predicted."""
    shown = Table("", "predicted", "achieved", "error", box=None)
    if others:
        shown.add_column(name, overflow="fold")
        shown.add_column("change")
    for column in shown.columns[1:]:
        column.justify = "right"
    by_what = {x.what: x for x in others}
    for what in dict.fromkeys([*(x.what for x in lines), *by_what]):
        line = next((x for x in lines if x.what == what), Line(what, 0.0, 0.0, share=True))
        cells = [_figure(line.predicted), _figure(line.achieved), line.shown_error]
        if others:
            other = by_what.get(what, Line(what, 0.0, None, share=True)).predicted
            change = Line(what, other, line.predicted, line.share)
            cells += [_figure(other), change.shown_error]
        shown.add_row(what, *cells)
    Console().print(shown)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if abs(value) < 10 else f"{value:.1f}"
