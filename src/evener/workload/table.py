"""A comparison as one table: figures first, then where the device time went."""

from collections.abc import Sequence

from evener.execute.sim.figures import Percentiles
from evener.ledger.causes import Cause
from evener.workload.compare import Compared
from evener.workload.report import Summary

SHOWN = 0.0005
"""A cause is listed when it takes this share of some case's device time."""


def table(results: Sequence[Compared]) -> list[tuple[str, list[str]]]:
    """Rows of (what, one cell per case): figures first, then the ledger's shares of all device time in percent."""
    reports = [r.report for r in results]
    rows: list[tuple[str, list[str]]] = [
        ("plan", [r.plan for r in results]),
        ("policy", [r.policy for r in results]),
        ("completed", [f"{r.completed} of {r.requests}" for r in reports]),
        ("duration, s", [f"{r.duration_s:.1f}" for r in reports]),
        ("output tok/s", [f"{r.output_tok_s:.1f}" for r in reports]),
    ]
    if any(len(r.output_tok_s) > 1 for r in results):
        rows.append(("  least to most", [f"{min(r.output_tok_s):.1f} to {max(r.output_tok_s):.1f}" for r in results]))
    rows.append(("goodput, req/s", [f"{r.goodput_req_s:.3f}" for r in reports]))
    for name, pick in (("TTFT", "ttft_ms"), ("TPOT", "tpot_ms"), ("E2E", "e2e_ms")):
        for key in ("p50", "p90", "p99", "mean"):
            rows.append((f"{name} {key}, ms", [_ms(getattr(r, pick), key) for r in reports]))
    rows.append(("devices", [str(len(r.account.devices)) for r in results]))
    for cause in Cause:
        shares = [r.account.total.share(cause) for r in results]
        if max(shares) >= SHOWN:
            rows.append((f"{cause.label}, %", [f"{100 * s:.1f}" for s in shares]))
    rows.append(("useful, %", [f"{100 * r.account.total.useful:.1f}" for r in results]))
    peaks = [r.account.total.achieved_over_peak for r in results]
    rows.append(("of peak, %", ["-" if p is None else f"{100 * p:.0f}" for p in peaks]))
    return rows


def _ms(summary: Summary | Percentiles, key: str) -> str:
    value = getattr(summary, key)
    return "-" if value is None else f"{value:.1f}"
