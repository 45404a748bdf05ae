"""The best of several measurements of the same devices: what others do on a shared host only ever slows them down."""

from collections.abc import Sequence

from msgspec import structs

from evener.cost.rates import AttentionRates, Collective, DeviceProfile, GemmRates, Profile, Rates


def quietest(measured: Sequence[Profile]) -> Profile:
    """For every figure its best value over these profiles of the same devices; the rest is as in the last one."""
    last = measured[-1]
    devices = [_device([p.devices[k] for p in measured]) for k in range(len(last.devices))]
    collectives = [
        # One measurement may have found no shared memory, and assumed others.
        _collective(
            [c for p in measured for c in p.collectives if (c.transport, c.ranks) == (known.transport, known.ranks)]
        )
        for known in last.collectives
    ]
    return structs.replace(last, devices=tuple(devices), collectives=tuple(collectives))


def _device(measured: Sequence[DeviceProfile]) -> DeviceProfile:
    return structs.replace(
        measured[-1], alone=_rates([d.alone for d in measured]), together=_rates([d.together for d in measured])
    )


def _rates(measured: Sequence[Rates]) -> Rates:
    last = measured[-1]
    gemm = [
        GemmRates(g.dtype, tuple((r, max(_at(m, g.dtype, r, rate) for m in measured)) for r, rate in g.points))
        for g in last.gemm
    ]
    attention = []
    for a in last.attention:
        same = [b for m in measured for b in m.attention if b.kv_dtype == a.kv_dtype]
        attention.append(AttentionRates(a.kv_dtype, max(b.flops for b in same), max(b.bandwidth for b in same)))
    return structs.replace(
        last, gemm=tuple(gemm), attention=tuple(attention), op_ns=min(m.op_ns for m in measured),
        read_bandwidth=max(m.read_bandwidth for m in measured),
    )  # fmt: skip


def _at(rates: Rates, dtype: str, rows: int, otherwise: float) -> float:
    """What was measured for so many rows, where it was."""
    return next((dict(g.points).get(rows, otherwise) for g in rates.gemm if g.dtype == dtype), otherwise)


def _collective(measured: Sequence[Collective]) -> Collective:
    last = measured[-1]
    by_size = [dict(c.points) for c in measured]
    return structs.replace(
        last, points=tuple((size, min(m.get(size, ns) for m in by_size)) for size, ns in last.points)
    )
