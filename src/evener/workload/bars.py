"""Ledgers side by side as a picture: one stacked bar per device, one colour per cause, time to the right."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from evener.errors import InvalidInput
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.colours import COLOURS
from evener.pictures import check_drawable, new_figure, save_figure
from evener.units import NS_PER_S

LEAST = 0.004
"""A cause has a place in the legend when it takes this share of some device's time."""
MOST_BARS = 64


def plot_ledgers(
    ledgers: Sequence[tuple[str, Account]],
    path: Path,
    title: str,
    note: str = "",
    labels: Mapping[str, str] | None = None,
) -> None:
    """Draw accounts, each under its name, into `path` (.png, .svg or .pdf). `note` stands below in small print.

    `labels`: what to call a device in the picture, where that is not its name.

    Raises InvalidInput when matplotlib is not installed, the ending is another, or there are too many devices to read.
    """
    check_drawable(path, "the picture")
    bars = sum(len(account.devices) for _, account in ledgers)
    if bars > MOST_BARS:
        raise InvalidInput(f"{bars} devices make an unreadable picture, the limit is {MOST_BARS}; compare fewer")
    figure = new_figure(10, 0.9 + 0.42 * bars + 0.4 * len(ledgers))
    axes = figure.add_subplot()
    shown: set[Cause] = set()
    ticks: list[tuple[float, str]] = []
    y = 0.0
    for name, account in ledgers:
        axes.text(0, y - 0.66, _heading(name, account), va="bottom", ha="left", fontsize=10, fontweight="bold")
        for device, use in account.devices.items():
            _bar(axes, y, use.causes_ns, shown)
            ticks.append((y, (labels or {}).get(device, device)))
            y += 1.0
        y += 0.9
    _finish(axes, ticks, y, max(account.window_s for _, account in ledgers))
    handles = [axes.barh(0, 0, color=COLOURS[c], edgecolor="#444444", linewidth=0.3) for c in Cause if c in shown]
    causes = [c.label.replace("_", " ") for c in Cause if c in shown]
    axes.legend(handles, causes, loc="upper left", bbox_to_anchor=(1.005, 1.0), frameon=False, fontsize=9)
    axes.set_title(title, loc="left", fontsize=12, pad=10)
    if note:
        figure.text(0.01, -0.03, note, fontsize=7.5, color="#555555", ha="left", va="bottom")
    save_figure(figure, path, "the picture", dpi=110, bbox_inches="tight")


def _heading(name: str, account: Account) -> str:
    return f"{name}, {account.window_s:.1f} s, {100 * account.total.useful:.0f}% useful"


def _bar(axes: Any, y: float, causes_ns: Sequence[int], shown: set[Cause]) -> None:
    left, whole = 0.0, max(1, sum(causes_ns))
    for cause in Cause:
        width = causes_ns[cause] / NS_PER_S
        if width:
            axes.barh(y, width, left=left, height=0.78, color=COLOURS[cause])
            left += width
        if causes_ns[cause] / whole >= LEAST:
            shown.add(cause)


def _finish(axes: Any, ticks: Sequence[tuple[float, str]], bottom: float, longest: float) -> None:
    axes.set_yticks([y for y, _ in ticks], [name for _, name in ticks], fontsize=9)
    axes.set_ylim(bottom - 1.3, -1.15)  # the first case on top
    axes.set_xlim(0, longest)
    axes.set_xlabel("seconds of wall time of each device")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
