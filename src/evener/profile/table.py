"""A profile for people: one table of devices, one of collectives, and what is missing."""

from rich.console import Console
from rich.table import Table

from evener.cost.rates import DeviceProfile, Profile, Rates
from evener.spec.model import kv_token_bytes
from evener.units import human_bytes

HEAD_DIM = 64
"""Head size for which attention rates are shown as pairs and keys."""


def show(profile: Profile, console: Console) -> None:
    """Print the figures; notes say what is assumed or unsure."""
    console.print(_gemm(profile))
    console.print(_attention(profile))
    console.print(_rest(profile))
    if profile.collectives:
        console.print(_collectives(profile))
    for text in (*profile.missing, *profile.notes):
        console.print(f"[yellow]note[/yellow] {text}", highlight=False)
    if profile.source == "default":
        console.print("[yellow]assumed figures[/yellow]: run `evener devices` to measure", highlight=False)


def _modes(d: DeviceProfile) -> list[tuple[str, Rates]]:
    return [("alone", d.alone)] + ([("together", d.together)] if d.peers else [])


def _table(title: str, left: list[str], right: list[str]) -> Table:
    table = Table(title=title, title_justify="left")
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _gemm(profile: Profile) -> Table:
    rows = sorted({r for d in profile.devices for t in d.alone.gemm for r, _ in t.points})
    right = [f"{r} row" if r == 1 else f"{r} rows" for r in rows]
    table = _table("GEMM in GFLOP/s, weights from memory", ["device", "", "dtype"], right)
    for d in profile.devices:
        for m, (mode, rates) in enumerate(_modes(d)):
            for k, gemm in enumerate(rates.gemm):
                by_rows = dict(gemm.points)
                cells = [f"{by_rows[r] / 1e9:,.1f}" if r in by_rows else "-" for r in rows]
                table.add_row(d.name if m + k == 0 else "", mode if k == 0 else "", gemm.dtype, *cells)
        table.add_section()
    return table


def _rest(profile: Profile) -> Table:
    table = _table("Memory, host", ["device", ""], ["read GB/s", "op us"])
    for d in profile.devices:
        for m, (mode, rates) in enumerate(_modes(d)):
            cells = (f"{rates.read_bandwidth / 1e9:.1f}", f"{rates.op_ns / 1e3:.1f}")
            table.add_row(d.name if m == 0 else "", mode, *cells)
        declared = [f"declared {d.slowdown:g} times as slow"] if d.slowdown != 1 else []
        declared += [f"one of {d.sharers} workers on {d.hardware}"] if d.sharers > 1 else []
        if declared:
            table.caption = "; ".join(filter(None, [str(table.caption or ""), f"{d.name}: {', '.join(declared)}"]))
    return table


def _attention(profile: Profile) -> Table:
    right = ["prefill, M pairs/s", "decode, M keys/s"]
    table = _table(f"Attention, one head of {HEAD_DIM}", ["device", "", "KV"], right)
    for d in profile.devices:
        for m, (mode, rates) in enumerate(_modes(d)):
            for k, a in enumerate(rates.attention):
                pairs, keys = a.flops / (4 * HEAD_DIM), a.bandwidth / (2 * kv_token_bytes(HEAD_DIM, a.kv_dtype))
                cells = (f"{pairs / 1e6:,.0f}", f"{keys / 1e6:,.0f}")
                table.add_row(d.name if m + k == 0 else "", mode if k == 0 else "", a.kv_dtype, *cells)
        table.add_section()
    return table


def _collectives(profile: Profile) -> Table:
    sizes = sorted({size for c in profile.collectives for size, _ in c.points})
    groups = [f"{c.transport}, {c.ranks} ranks" for c in profile.collectives]
    table = _table("All-reduce in microseconds", ["bytes per rank"], groups)
    for size in sizes:
        cells = [dict(c.points).get(size) for c in profile.collectives]
        table.add_row(human_bytes(size), *("-" if ns is None else f"{ns / 1e3:,.1f}" for ns in cells))
    return table
