"""Rates of devices that are not at hand, from published peaks. Pure. `source` of such a profile says `published`.

A data sheet says what a device could do at best. What share of it programs reach is assumed here, once for all
devices, and told in the profile's `missing`. Measured tables (`evener.cost.tables`) need no such shares.
"""

from collections.abc import Sequence
from typing import Literal

from msgspec import structs

from evener.cost.rates import (
    PUBLISHED,
    Collective,
    DeviceProfile,
    GemmRates,
    Profile,
    Rates,
    any_kv,
    bind,
    default_profile,
    hardware,
)
from evener.errors import InvalidDevice
from evener.spec.cluster import Cluster, Device
from evener.spec.model import DTYPE_BYTES
from evener.spec.peaks import Peaks

GEMM_SHARE = 0.7
"""Of peak flop/s, in large matrix products."""
READ_SHARE = 0.85
"""Of peak bandwidth, reading weights or keys and values."""
ATTENTION_SHARE = 0.5
"""Of peak flop/s of 16-bit products, in prefill attention."""
OP_NS = 3_000.0
"""To start an operator that a graph has recorded, and to drain the one before."""
MOST_ROWS = 4096
COLLECTIVE_NS = {2: 6_000.0, 4: 8_000.0, 8: 12_000.0}
"""Of an all-reduce of next to nothing by ranks; what the links add is in the links."""
ASSUMED = (
    f"published peaks: assumed that {GEMM_SHARE:.0%} of the flop rate, {READ_SHARE:.0%} of the bandwidth and, in "
    f"prefill attention, {ATTENTION_SHARE:.0%} of the flop rate are reached, and {OP_NS / 1000:g} us per operator"
)


def published_rates(peaks: Peaks) -> Rates:
    """What is assumed to be reached of these peaks."""
    read = peaks.bandwidth * READ_SHARE
    tables = []
    for dtype, flops in peaks.flops:
        if dtype not in DTYPE_BYTES:
            raise InvalidDevice(f"peaks for dtype {dtype!r}: it is not one of {', '.join(DTYPE_BYTES)}")
        reached = flops * GEMM_SHARE
        # Up to the knee reading the weights takes longer than multiplying by them.
        knee = round(reached * DTYPE_BYTES[dtype] / (2 * read))
        rows = sorted({1, max(2, min(knee, MOST_ROWS - 1)), MOST_ROWS})
        tables.append(GemmRates(dtype, tuple((r, reached) for r in rows)))
    best = max((rate for dtype, rate in peaks.flops if dtype in ("bf16", "fp16")), default=peaks.flops[0][1])
    return Rates(tuple(tables), read, any_kv(best * ATTENTION_SHARE, read), OP_NS)


def published_collectives() -> tuple[Collective, ...]:
    """What an all-reduce costs before any byte moves."""
    return tuple(Collective(PUBLISHED, n, ((1024, ns), (1 << 20, ns))) for n, ns in COLLECTIVE_NS.items())


def cluster_profile(cluster: Cluster, measured: Profile | None = None) -> Profile:
    """The profile of a cluster, bound to its devices: measured where a figure is given, published peaks or assumed
    figures elsewhere.

    `measured` holds devices of this host. A cluster with any published device says `published`, one with none and no
    measurement `default`.
    """
    sheets = [d for d in cluster.devices if d.peaks is not None]
    local = [d for d in cluster.devices if d.peaks is None]
    if not sheets:
        return bind(measured, local) if measured is not None else default_profile(local)
    own: list[DeviceProfile] = []
    missing = [ASSUMED]
    if local:
        base = bind(measured, local) if measured is not None else default_profile(local)
        own, missing = list(base.devices), [*base.missing, ASSUMED]
        collectives = (*base.collectives, *published_collectives())
    else:
        collectives = published_collectives()
    bound = bind(_of_sheets(sheets), sheets)
    profile = structs.replace(bound, devices=(*own, *bound.devices), collectives=collectives, missing=tuple(missing))
    return profile if measured is None else structs.replace(profile, host_ns=measured.host_ns)


def _of_sheets(devices: Sequence[Device]) -> Profile:
    rates: dict[Peaks, Rates] = {}
    entries = []
    for d in devices:
        assert d.peaks is not None
        kind: Literal["cpu", "cuda"] = "cuda" if d.kind == "cuda" else "cpu"
        reached = rates.get(d.peaks) or rates.setdefault(d.peaks, published_rates(d.peaks))
        entries.append(DeviceProfile(hardware(d), kind, reached, reached, hardware=hardware(d), peaks=d.peaks))
    return Profile(tuple(entries), (), "published", missing=(ASSUMED,))
