"""An account as a plain table, for logs and reports. (`evener ledger` draws it in colours.)"""

from evener.ledger.account import Account, Use
from evener.ledger.causes import Cause

LEAST = 0.0005
"""Causes below this share on every line have no column."""


def table(account: Account) -> str:
    """One line per device, and one for all: shares of wall time by cause, in percent."""
    lines: dict[str, Use] = {**account.devices, "all": account.total}
    columns = [c for c in Cause if any(use.share(c) >= LEAST for use in lines.values())]
    head = ["device", "seconds", *(c.label for c in columns), "of peak"]
    rows = [
        [
            name,
            f"{use.wall_s:.2f}",
            *(f"{100 * use.share(c):.1f}" for c in columns),
            "" if use.achieved_over_peak is None else f"{100 * use.achieved_over_peak:.0f}%",
        ]
        for name, use in lines.items()
    ]
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return "\n".join(_line(row, widths) for row in [head, *rows])


def _line(cells: list[str], widths: list[int]) -> str:
    first = cells[0].ljust(widths[0])
    rest = [cell.rjust(width) for cell, width in zip(cells[1:], widths[1:], strict=True)]
    return "  ".join([first, *rest]).rstrip()
