"""Measured (or assumed) rates of devices and collectives: the data that cost models are built from. Pure.

A `Rates` holds what one device does per second; a `DeviceProfile` holds it twice, for the device alone and for
all measured devices working at once, because devices that share a memory bus are slower together.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from evener.errors import InvalidDevice, InvalidInput
from evener.spec.cluster import Device
from evener.spec.model import DTYPE_BYTES
from evener.spec.peaks import Peaks

FORMAT = 9
"""Version of the stored form; a file of another version is measured again."""

COLD = 1.2
"""How much longer a slowed worker computes that shares its core: it sleeps between its turns and finds caches cold,
where one with a core to itself keeps it. Assumed; seen: 1.1 at a slow-down of 2, 1.25 at 4."""

LATE = 1.35
"""How much longer still where such workers are of one replica, and every sum or message finds the other asleep or at
work. Assumed; seen on two machines: 1.34 and 1.36."""

Floats = NDArray[np.float64]


def _positive(what: str, value: float) -> None:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{what} is {value}; it must be a positive number")


def _rising(cost: Floats) -> Floats:
    """Never-falling costs: noise only adds, so what a larger size took bounds the smaller ones from above."""
    out: Floats = np.minimum.accumulate(cost[::-1])[::-1]
    return out


class GemmRates(Struct, frozen=True):
    """Rate of `x [rows, k] @ W [k, n]` by rows, with weights that come from memory, not from the cache."""

    dtype: str
    points: tuple[tuple[int, float], ...]
    """(rows, flop/s), rows ascending; one weight and row is two flop."""

    def __post_init__(self) -> None:
        rows = [r for r, _ in self.points]
        if not rows or rows[0] < 1 or any(b <= a for a, b in itertools.pairwise(rows)):
            raise ValueError(f"gemm {self.dtype}: rows {rows} must be positive and ascending")
        for r, rate in self.points:
            _positive(f"gemm {self.dtype}, {r} rows", rate)


class AttentionRates(Struct, frozen=True):
    """Rates of attention over a KV cache of one dtype, which comes from memory, not from the processor's cache."""

    kv_dtype: str
    flops: float
    """Flop/s of prefill attention; a (query head, key) pair is 4 * head_dim flop."""
    bandwidth: float
    """Bytes per second of K and V read by decode attention."""

    def __post_init__(self) -> None:
        _positive(f"prefill attention over {self.kv_dtype}", self.flops)
        _positive(f"decode attention over {self.kv_dtype}", self.bandwidth)


class Rates(Struct, frozen=True):
    """What one device does per second, without any declared slow-down."""

    gemm: tuple[GemmRates, ...]
    read_bandwidth: float
    """Bytes per second read from memory."""
    attention: tuple[AttentionRates, ...]
    """By the dtype of the KV cache."""
    op_ns: float
    """Host time to start one operator, nanoseconds."""
    step_ns: float = 0.0
    """What the worker computes for a batch beside its operators (message, tensors, answer), nanoseconds, where the
    device does that itself. 0: the host does it, in `Profile.host_ns`."""

    def __post_init__(self) -> None:
        for what in ("read_bandwidth", "op_ns"):
            _positive(what, getattr(self, what))
        if not (math.isfinite(self.step_ns) and self.step_ns >= 0):
            raise ValueError(f"step_ns is {self.step_ns}; it must be 0 or more")

    def gemm_ns(self, dtype: str, rows: NDArray[np.int64] | int) -> Floats:
        """Nanoseconds per weight (element of W) of a GEMM over `rows` rows; 0 for no rows.

        Between measured rows the time is interpolated, past the last one it grows at the last rate; it is never
        below reading the weight once, and never falls as rows grow. Raises InvalidInput for an unmeasured dtype.
        """
        for table in self.gemm:
            if table.dtype == dtype:
                break
        else:
            have = ", ".join(t.dtype for t in self.gemm) or "none"
            raise InvalidInput(f"no GEMM rate for dtype {dtype!r} in the profile (measured: {have}); use one of these")
        r = np.asarray(rows, dtype=np.float64)
        at = np.array([p[0] for p in table.points], dtype=np.float64)
        floor = DTYPE_BYTES[dtype] / self.read_bandwidth
        cost = _rising(np.maximum(2 * at / np.array([p[1] for p in table.points]), floor))
        past = np.maximum(r / at[-1], 1.0)
        out: Floats = np.where(r > 0, np.interp(r, at, cost) * past, 0.0) * 1e9
        return out

    def attention_over(self, kv_dtype: str) -> AttentionRates:
        """The rates of attention over a KV cache of this dtype. Raises InvalidInput for an unmeasured one."""
        for rates in self.attention:
            if rates.kv_dtype == kv_dtype:
                return rates
        have = ", ".join(a.kv_dtype for a in self.attention) or "none"
        raise InvalidInput(
            f"no attention rate for kv_dtype {kv_dtype!r} in the profile (measured: {have}); use one of these"
        )


class DeviceProfile(Struct, frozen=True):
    """One device. `name` is a worker's name; several workers may share one piece of hardware."""

    name: str
    kind: Literal["cpu", "cuda"]
    alone: Rates
    together: Rates
    """While the devices `peers` work as well."""
    peers: tuple[str, ...] = ()
    hardware: str = ""
    """What was measured: `cpu:0` for the workers `cpu:0` and `cpu:0#1`."""
    slowdown: float = 1.0
    """Declared slow-down; multiplies every compute time."""
    sharers: int = 1
    """Workers on the same core or GPU, this one included."""
    crowding: float = 1.0
    """By how much they lengthen its compute times: the time of the hardware it asks for over what it gets."""
    late: float = 1.0
    """By how much it computes longer where it and another of its replica on the same hardware wait for each other."""
    peaks: Peaks | None = None
    """Published, where the rates are what is assumed to be reached of them."""

    def rates(self, alone: bool) -> Rates:
        """The rates for a plan that uses this device `alone`, or several devices at once."""
        return self.alone if alone else self.together

    def stretch(self, alone: bool) -> float:
        """By how much compute times grow: declared slow-down times what sharing the hardware adds."""
        if alone:
            return self.slowdown
        cold = COLD if self.sharers > 1 and self.slowdown > 1 else 1.0
        return self.slowdown * self.crowding * cold * self.late

    def lost(self, alone: bool) -> float:
        """Share of its compute times in which it waits for those who share its hardware."""
        return 0.0 if alone else 1.0 - 1.0 / self.crowding


PUBLISHED = "published"
"""Transport of collectives among devices that were not measured here."""


class Collective(Struct, frozen=True):
    """Latency of an all-reduce among `ranks` ranks, by message size."""

    transport: str
    ranks: int
    points: tuple[tuple[int, float], ...]
    """(bytes per rank, nanoseconds), bytes ascending."""

    def __post_init__(self) -> None:
        sizes = [b for b, _ in self.points]
        if self.ranks < 2 or not sizes or any(b <= a for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"collective among {self.ranks} ranks, sizes {sizes}: need 2 ranks and ascending sizes")
        for size, cost in self.points:
            _positive(f"collective of {size} bytes", cost)

    def ns(self, nbytes: Floats) -> Floats:
        """Nanoseconds for messages of `nbytes`; past the last size at the last slope. Never falls."""
        at = np.array([p[0] for p in self.points], dtype=np.float64)
        cost = _rising(np.array([p[1] for p in self.points], dtype=np.float64))
        slope = (cost[-1] - cost[-2]) / (at[-1] - at[-2]) if len(at) > 1 else cost[-1] / max(at[-1], 1.0)
        out: Floats = np.interp(nbytes, at, cost) + np.maximum(nbytes - at[-1], 0.0) * slope
        return out


class Profile(Struct, frozen=True):
    """Devices and collectives of one host."""

    devices: tuple[DeviceProfile, ...]
    collectives: tuple[Collective, ...]
    source: Literal["measured", "published", "default"]
    """`published`: some devices by their makers' peaks; `default`: assumed figures, nothing was measured."""
    host_ns: int = 300_000
    """Assumed control time per batch that a device without `Rates.step_ns` cannot hide, until live spans replace it."""
    uneven: float = 0.0
    """Part of the slowest rank's compute that ranks of a stage wait for each other besides, late in turns; live spans
    tell it."""
    missing: tuple[str, ...] = ()
    """What could not be measured and is assumed instead, with the reason."""
    notes: tuple[str, ...] = ()
    """What makes the figures less sure."""
    key: str = ""
    """Host, processor and versions that the figures hold for."""
    measured_at: str = ""
    """ISO 8601, UTC."""
    format: int = FORMAT

    def device(self, name: str) -> DeviceProfile:
        """The profile of a worker. Raises InvalidDevice with the remedy."""
        for d in self.devices:
            if d.name == name:
                return d
        have = ", ".join(d.name for d in self.devices) or "none"
        raise InvalidDevice(
            f"device {name!r} is not in the profile (has: {have}); run `evener devices --devices {name}`"
        )

    def collective_ns(self, ranks: int, nbytes: Floats, published: bool = False) -> Floats:
        """Nanoseconds of an all-reduce among `ranks`; unmeasured rank counts scale with `ranks - 1`.

        `published`: among devices known by their makers' figures; what was measured among this host's is not theirs.
        """
        if ranks < 2 or not self.collectives:
            return np.zeros_like(nbytes)
        theirs = [c for c in self.collectives if (c.transport == PUBLISHED) == published] or self.collectives
        nearest = min(theirs, key=lambda c: (abs(c.ranks - ranks), c.ranks))
        return np.where(nbytes > 0, nearest.ns(nbytes) * ((ranks - 1) / (nearest.ranks - 1)), 0.0)


def hardware(device: Device) -> str:
    """Name of what a worker runs on: `cpu:0#1` -> `cpu:0`."""
    return device.name.partition("#")[0]


def _sharing(device: Device, devices: Sequence[Device]) -> list[list[Device]]:
    """The workers, this one included, on each piece of hardware that it uses: cores, or its GPU."""
    same_host = [d for d in devices if d.host == device.host and d.kind == device.kind]
    if device.kind == "cuda":
        return [[d for d in same_host if d.index == device.index]]
    return [[d for d in same_host if core in d.cores] for core in device.cores]


def crowding(device: Device, devices: Sequence[Device]) -> float:
    """What a worker asks of its hardware over what it gets there, beside these.

    A worker with a slow-down of s computes 1/s of the time and leaves the hardware to others for the rest; together
    they may ask for more than there is. Then each gets the same, but no more than it asks for.
    """
    return max(_crowding(device, sharing) for sharing in _sharing(device, devices))


def _crowding(device: Device, sharing: Sequence[Device]) -> float:
    asked = sorted(1.0 / d.slowdown for d in sharing)
    left = 1.0
    for k, wish in enumerate(asked):
        fair = left / (len(asked) - k)
        if wish > fair:
            return max(1.0, 1.0 / device.slowdown / fair)
        left -= wish
    return 1.0


def bind(profile: Profile, devices: Sequence[Device]) -> Profile:
    """The same figures for these workers: one entry per worker, with its slow-down and who shares its hardware.

    Raises InvalidDevice when a worker's hardware was not measured.
    """
    have = {d.hardware or d.name: d for d in profile.devices}
    bound = []
    for d in devices:
        at = hardware(d)
        if at not in have:
            raise InvalidDevice(
                f"device {d.name}: {at} is not in the profile (has: {', '.join(have) or 'none'}); "
                f"run `evener devices --devices {at}`"
            )
        sharers = max(len(sharing) for sharing in _sharing(d, devices))
        beside = {"sharers": sharers, "crowding": crowding(d, devices)}
        bound.append(structs.replace(have[at], name=d.name, hardware=at, slowdown=d.slowdown, **beside))
    return structs.replace(profile, devices=tuple(bound))


# ---- assumed figures -------------------------------------------------------------------------------------------


CPU_STEP_NS = 250_000.0
"""`Rates.step_ns` of a worker on CPU cores: assumed, until live spans correct it."""


def _assumed(
    peaks: dict[str, float], half_rows: float, bandwidth: float, attention: float, op_ns: float, step_ns: float = 0.0
) -> Rates:
    """Rates that rise with rows towards a peak (half of it at `half_rows`), below the memory roof."""
    tables = []
    for dtype, peak in peaks.items():
        points = []
        for rows in (1, 4, 16, 64, 256):
            roof = 2 * rows * bandwidth / DTYPE_BYTES[dtype]
            points.append((rows, min(peak * rows / (rows + half_rows), roof)))
        tables.append(GemmRates(dtype, tuple(points)))
    return Rates(tuple(tables), bandwidth, any_kv(attention, bandwidth), op_ns, step_ns)


def any_kv(flops: float, bandwidth: float) -> tuple[AttentionRates, ...]:
    """Attention that reads bytes of K and V at the same rate whatever their dtype: where nothing was measured."""
    return tuple(AttentionRates(dtype, flops, bandwidth) for dtype in DTYPE_BYTES)


def default_rates(device: Device) -> Rates:
    """Assumed, on the low side: a server core at 2.5 GHz with AVX2 (16 fp32 FMA a cycle, half of it reached, 8 GB/s a
    core); a data-centre GPU at half of the published dense peaks of an A100 40 GB (its data sheet, 2020)."""
    if device.kind == "cuda":
        half = {"fp32": 9.7e12, "bf16": 156e12, "fp16": 156e12, "int8": 312e12}
        return _assumed(half, 16.0, 1.0e12, 60e12, 5_000.0)
    n = max(1, len(device.cores))
    peaks = {"fp32": 40e9 * n, "bf16": 40e9 * n, "int8": 60e9 * n}
    return _assumed(peaks, 2.0, 8e9 * n**0.7, 20e9 * n, 3_000.0, CPU_STEP_NS)


DEFAULT_COLLECTIVE = Collective("assumed", 2, ((2048, 15_000.0), (65_536, 60_000.0), (1 << 20, 600_000.0)))
"""Assumed shared-memory all-reduce between two ranks."""


def default_profile(devices: Sequence[Device]) -> Profile:
    """Assumed figures for when nothing was measured, and for simulations and tests. `source` says `default`."""
    rows = []
    for d in devices:
        rates = default_rates(d)
        kind: Literal["cpu", "cuda"] = "cuda" if d.kind == "cuda" else "cpu"
        rows.append(DeviceProfile(hardware(d), kind, rates, rates, hardware=hardware(d)))
    raw = Profile(
        tuple(rows), (DEFAULT_COLLECTIVE,), "default", missing=("all figures are assumed: nothing was measured",)
    )
    return bind(raw, devices)
