"""A cost model from measured operator latencies of devices that are not at hand. Pure: the tables come as arrays.

`evener.profile.aiconfigurator` reads them from the package `aiconfigurator-core` (the extra `tables`). What is used:

    GEMM by (rows, columns, depth) and dtype    interpolated in the logarithms of columns and depth, and in rows
    attention of prefill and of decode          fitted: a fixed time, a time per row, a time per pair or per key
    all-reduce by size and ranks                interpolated in size

What they lack is in `MissingTerms`, each of them named and settable; the defaults are assumptions.
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from msgspec import Struct, structs
from numpy.typing import NDArray

from evener.cost.base import BatchShape, DecodeRun, ShardTime, stepwise_run
from evener.cost.device import DeviceCosts
from evener.cost.published import published_collectives, published_rates
from evener.cost.rates import Collective, DeviceProfile, Floats, Profile, bind, hardware
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidInput
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, size
from evener.units import Nanoseconds


class MissingTerms(Struct, frozen=True):
    """What measured operators do not say. Times in nanoseconds."""

    host_ns: int = 300_000
    """Control time per batch that the device waits for."""
    launch_ns: float = 0.0
    """Host time to start one kernel where no graph has recorded them: while one batch's kernels are started the device
    works, so a stage takes what is longer, starting `KERNELS_PER_LAYER` of them in every layer or the device's time."""
    moving_factor: float = 1.0
    """How many times as long the bytes of an all-reduce take as measured between idle devices, its fixed part aside: an
    older library, no direct path, ranks that arrive unevenly."""
    op_ns: float = 2_000.0
    """A norm, rotation or activation on next to no data, once started by a graph."""
    elementwise_share: float = 0.8
    """Of peak bandwidth, in norms, rotation, activation and sampling."""
    row_ns: float = 1_000.0
    """Choosing a token and handing it on, per sampled row: the sampler, and a host that nothing hides."""


ATTENTION_EXTRA, FFN_EXTRA = 3, 2
"""Elementwise operators beside the measured ones: norm, rotation, cache write; norm, activation."""
KERNELS_PER_LAYER = 12
"""Two norms, two all-reduces, four GEMMs, rotation, cache write, attention, activation."""


class GemmGrid:
    """Latency of `x [m, k] @ W [k, n]` in nanoseconds on a grid. `ns` has the shape [m, n, k]."""

    def __init__(self, rows: Sequence[int], columns: Sequence[int], depth: Sequence[int], ns: Floats) -> None:
        if ns.shape != (len(rows), len(columns), len(depth)) or not (np.isfinite(ns) & (ns > 0)).all():
            raise ValueError(f"GEMM grid of {ns.shape} must hold a positive time for every one of its axes' points")
        self.rows = np.asarray(rows, dtype=np.float64)
        self._columns, self._depth = (np.asarray(axis, dtype=np.float64) for axis in (columns, depth))
        self._log = np.log(ns)

    def ns(self, rows: NDArray[np.int64], columns: int, depth: int) -> Floats:
        """Nanoseconds by row count; 0 for no rows or an empty matrix. Past the grid in proportion; never falls."""
        if columns < 1 or depth < 1:
            return np.zeros(len(rows))
        n, (i, a) = float(columns), _place(self._columns, columns)
        k, (j, b) = float(depth), _place(self._depth, depth)
        corners = self._log[:, i : i + 2, j : j + 2]
        at = np.exp(
            corners[:, 0, 0] * (1 - a) * (1 - b) + corners[:, 1, 0] * a * (1 - b)
            + corners[:, 0, 1] * (1 - a) * b + corners[:, 1, 1] * a * b
        )  # fmt: skip
        at = at * max(1.0, n / self._columns[-1]) * max(1.0, k / self._depth[-1])
        at = np.minimum.accumulate(at[::-1])[::-1]
        r = rows.astype(np.float64)
        out: Floats = np.where(r > 0, np.interp(r, self.rows, at) * np.maximum(r / self.rows[-1], 1.0), 0.0)
        return out


def _place(axis: Floats, value: int) -> tuple[int, float]:
    """Where a value lies on an axis: the point below, and the share of the way to the next in logarithms."""
    i = int(np.clip(np.searchsorted(axis, value, side="right") - 1, 0, len(axis) - 2))
    share = np.log(value / axis[i]) / np.log(axis[i + 1] / axis[i])
    return i, float(np.clip(share, 0.0, 1.0))


class AttentionFit(Struct, frozen=True):
    """Attention of one layer with so many heads: `fixed_ns + row_ns * rows + unit_ns * (pairs or keys)`."""

    heads: int
    kv_heads: int
    head_dim: int
    fixed_ns: float
    row_ns: float
    unit_ns: float
    error: float
    """Median relative error against the measured points."""
    kv_dtype: str = "bf16"


class OperatorTables(Struct, frozen=True):
    """What was measured on one kind of device, with one engine's kernels."""

    system: str
    """`h100_sxm`."""
    source: str
    """Package, engine and version."""
    gemm: Mapping[str, GemmGrid]
    """By dtype."""
    prefill: tuple[AttentionFit, ...]
    decode: tuple[AttentionFit, ...]
    collectives: tuple[Collective, ...]
    """All-reduces inside one host."""


def nearest(fits: Sequence[AttentionFit], heads: int, kv_heads: int, head_dim: int, what: str) -> AttentionFit:
    """The fit of the most alike shape, times per row, pair and key scaled to this one. Raises InvalidInput if none.

    `what`: prefill is scaled with query heads, decode, which reads K and V, with KV heads.
    """
    if not fits:
        raise InvalidInput(f"the operator tables hold no {what} attention; take another engine or device")

    def distance(f: AttentionFit) -> tuple[float, int, int]:
        ratios = (f.heads / heads, f.kv_heads / kv_heads, f.kv_heads / kv_heads, (f.head_dim / head_dim) ** 4)
        return sum(abs(math.log(x)) for x in ratios), f.heads, f.kv_heads

    best = min(fits, key=distance)
    wide = head_dim / best.head_dim
    grown = wide * (heads / best.heads if what == "prefill" else kv_heads / best.kv_heads)
    return structs.replace(
        best, heads=heads, kv_heads=kv_heads, head_dim=head_dim,
        row_ns=best.row_ns * wide * heads / best.heads, unit_ns=best.unit_ns * grown,
    )  # fmt: skip


class TableCosts(DeviceCosts):
    """Times of the phases on one device from its tables."""

    def __init__(
        self, device: DeviceProfile, model: ModelSpec, tables: OperatorTables, terms: MissingTerms, *,
        alone: bool, dtype: str, kv_dtype: str,
    ) -> None:  # fmt: skip
        super().__init__(device, model, alone=alone, dtype=dtype, kv_dtype=kv_dtype)
        self._gemm = _grid(tables, "bf16" if dtype == "fp16" else dtype)
        self._head_gemm = tables.gemm.get("bf16", self._gemm)
        self._terms = terms
        self._attend = {
            what: _attention(tables, fits, kv_dtype)
            for what, fits in (("prefill", tables.prefill), ("decode", tables.decode))
        }

    def _extra(self, rows: NDArray[np.int64], values_per_row: int, ops: int) -> Floats:
        """Elementwise operators: their traffic and their starts."""
        traffic = rows * (values_per_row * self.activation_bytes / self.rates.read_bandwidth * 1e9)
        out: Floats = np.where(rows > 0, traffic + ops * self._terms.op_ns, 0.0)
        return out

    def _attention(self, heads: int, kv_heads: int, what: str) -> AttentionFit:
        return nearest(self._attend[what], heads, kv_heads, self.model.head_dim, what)

    def attention_rows(self, rows: NDArray[np.int64], heads: int, kv_heads: int) -> Floats:
        """Projections, norm, rotation, cache write, and what attention takes whatever it attends to."""
        if heads == 0:
            return np.zeros(len(rows))
        hidden, dim = self.model.hidden, self.model.head_dim
        wide = dim * (heads + 2 * kv_heads)
        fit = self._attention(heads, kv_heads, "prefill")
        time = self._gemm.ns(rows, wide, hidden) + self._gemm.ns(rows, hidden, heads * dim)
        time = time + np.where(rows > 0, fit.fixed_ns + fit.row_ns * rows, 0.0)
        time = time + self._extra(rows, 4 * hidden + 2 * wide, ATTENTION_EXTRA)
        out: Floats = time * self.stretch
        return out

    def pair_ns(self, heads: int) -> float:
        """One layer's prefill attention, per (query token, key) pair."""
        if heads == 0:
            return 0.0
        return self._attention(heads, max(1, heads // self.model.group), "prefill").unit_ns * self.stretch

    def key_ns(self, heads: int, kv_heads: int) -> float:
        """One layer's decode attention, per key read by a decoding row."""
        return self._attention(heads, kv_heads, "decode").unit_ns * self.stretch if heads else 0.0

    def ffn_rows(self, rows: NDArray[np.int64], columns: int) -> Floats:
        """One layer's feed-forward block."""
        if columns == 0:
            return np.zeros(len(rows))
        hidden = self.model.hidden
        time = self._gemm.ns(rows, 2 * columns, hidden) + self._gemm.ns(rows, hidden, columns)
        time = time + self._extra(rows, 4 * hidden + 3 * columns, FFN_EXTRA)
        out: Floats = time * self.stretch
        return out

    def head_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """Logits of the sampled rows, in 16 bits whatever the layers are in, and choosing from them."""
        if vocabulary == 0:
            return np.zeros(len(rows))
        time = self._head_gemm.ns(rows, vocabulary, self.model.hidden) + self._extra(rows, 4 * vocabulary, 4)
        out: Floats = (time + rows * self._terms.row_ns) * self.stretch
        return out


def _grid(tables: OperatorTables, dtype: str) -> GemmGrid:
    if dtype not in tables.gemm:
        have = ", ".join(tables.gemm)
        raise InvalidInput(f"{tables.system} has no measured GEMM in {dtype!r} (measured: {have}); use one of these")
    return tables.gemm[dtype]


def _attention(tables: OperatorTables, fits: Sequence[AttentionFit], kv_dtype: str) -> list[AttentionFit]:
    wanted = "bf16" if kv_dtype == "fp16" else kv_dtype
    found = [f for f in fits if f.kv_dtype == wanted]
    if not found:
        have = ", ".join(sorted({f.kv_dtype for f in fits})) or "none"
        raise InvalidInput(f"{tables.system} has no measured attention over K and V in {kv_dtype!r} (measured: {have})")
    return found


def _slower(c: Collective, factor: float) -> Collective:
    """The same all-reduce with all that its size costs multiplied."""
    fixed = c.points[0][1]
    return Collective(c.transport, c.ranks, tuple((n, fixed + max(0.0, ns - fixed) * factor) for n, ns in c.points))


class TablesCostModel(RooflineCostModel):
    """`CostModel` of one plan over devices whose operators were measured elsewhere.

    `tables` gives them by device name. Between devices of one host the measured all-reduces are used, between hosts
    the cluster's links. Raises InvalidInput for a device without tables or a dtype that was not measured.
    """

    def __init__(
        self, model: ModelSpec, plan: Plan, cluster: Cluster, tables: Mapping[str, OperatorTables], version: int = 0, *,
        dtype: str = "bf16", kv_dtype: str = "bf16", terms: MissingTerms | None = None,
        measured_error: float | None = None,
    ) -> None:  # fmt: skip
        self.terms = terms = terms or MissingTerms()
        used = [cluster.device(name) for name in plan.devices()]
        for d in used:
            if d.name not in tables or d.peaks is None:
                raise InvalidInput(f"device {d.name} has no operator tables; give it a profile that has, like h100_sxm")
        entries = {}
        for d in used:
            assert d.peaks is not None
            reached = published_rates(d.peaks)
            rates = structs.replace(
                reached, read_bandwidth=d.peaks.bandwidth * terms.elementwise_share, op_ns=terms.op_ns
            )
            entries[hardware(d)] = DeviceProfile(hardware(d), "cuda", rates, rates, hardware=hardware(d))
        collectives = tables[used[0].name].collectives or published_collectives()
        collectives = tuple(_slower(c, terms.moving_factor) for c in collectives)
        bare = Profile(tuple(entries.values()), collectives, "published", host_ns=terms.host_ns)
        # The link of a host to itself is in the measured all-reduces.
        hosts = {d.host for d in used}
        across = [x for x in cluster.links if not (x.a == x.b and x.a in hosts)]

        def costs(device: DeviceProfile, of: ModelSpec, *, alone: bool, dtype: str, kv_dtype: str) -> TableCosts:
            return TableCosts(device, of, tables[device.name], terms, alone=alone, dtype=dtype, kv_dtype=kv_dtype)

        super().__init__(
            model, plan, bind(bare, used), version, dtype=dtype, kv_dtype=kv_dtype, links=across,
            measured_error=measured_error, costs_of=costs,
        )  # fmt: skip
        self._started = [
            [round(KERNELS_PER_LAYER * size(stage.layers) * terms.launch_ns) for stage in replica.stages]
            for replica in plan.replicas
        ]
        """What starting the kernels of a batch takes, by replica and stage."""

    def _waits(self, replica: int, stage: int, shape: BatchShape, device_ns: int) -> int:
        """How long the device waits for the host to start its kernels."""
        return max(0, self._started[replica][stage] - device_ns) if shape.tokens else 0

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        """See CostModel."""
        device_ns = super().stage_ns(replica, stage, shape)
        return Nanoseconds(device_ns + self._waits(replica, stage, shape, device_ns))

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> Sequence[ShardTime]:
        """See CostModel. Waiting between kernels is compute: a device in the middle of a batch does nothing else."""
        waits = self._waits(replica, stage, shape, super().stage_ns(replica, stage, shape))
        return [t._replace(compute=t.compute + waits) for t in super().shards_ns(replica, stage, shape)]

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        """See CostModel."""
        if not self._started[replica][stage]:
            return super().decode_run(replica, stage, rows, context, steps)
        return stepwise_run(self, replica, stage, rows, context, steps)

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """See CostModel."""
        return Nanoseconds(max(self.stage_ns(replica, s, shape) for s in range(len(self._started[replica]))))

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """See CostModel."""
        stages = range(len(self._started[replica]))
        delays = sum(self.delay_ns(replica, s) for s in stages) if shape.tokens else 0
        return Nanoseconds(sum(self.stage_ns(replica, s, shape) for s in stages) + delays)
