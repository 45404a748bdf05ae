"""All layers of a shard as one native object: a batch is a few calls, whatever the number of layers.

It runs the kernels of this package in the same order as `evener.model.decoder` does, so every row's result has the
same bits; rows pass in blocks, so that what lies between two products stays in the cache.

Shape suffixes: T rows of the batch, H hidden, D head_dim, P positions, Q query heads of the shard.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from evener.kernels import _native
from evener.kernels.checks import dense, fail, ints, kv_slabs
from evener.kernels.gemm import PackedWeight
from evener.kernels.rows import MAX_HEAD_DIM

_KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


class LayerParts(Protocol):
    """One layer's weights, as `evener.model.weights.LayerWeights` has them."""

    @property
    def attn_norm_H(self) -> torch.Tensor: ...
    @property
    def qkv_CH(self) -> PackedWeight: ...
    @property
    def qkv_bias_C(self) -> torch.Tensor | None: ...
    @property
    def q_norm_D(self) -> torch.Tensor | None: ...
    @property
    def k_norm_D(self) -> torch.Tensor | None: ...
    @property
    def o_HQ(self) -> PackedWeight: ...
    @property
    def o_bias_H(self) -> torch.Tensor | None: ...
    @property
    def mlp_norm_H(self) -> torch.Tensor: ...
    @property
    def gate_up_FH(self) -> PackedWeight: ...
    @property
    def gate_up_bias_F(self) -> torch.Tensor | None: ...
    @property
    def down_HF(self) -> PackedWeight: ...
    @property
    def down_bias_H(self) -> torch.Tensor | None: ...


class LayerRows(Protocol):
    """The rows of a batch, as `evener.model.inputs.Rows` has them."""

    @property
    def positions_T(self) -> torch.Tensor: ...
    @property
    def cu_R(self) -> torch.Tensor: ...
    @property
    def start_R(self) -> torch.Tensor: ...
    @property
    def tables_RM(self) -> torch.Tensor: ...
    @property
    def kv_slot_T(self) -> torch.Tensor: ...
    @property
    def n_rows(self) -> int: ...
    @property
    def n_real(self) -> int: ...


class LayerShape(NamedTuple):
    """What all layers of a shard share."""

    hidden: int
    n_q: int
    n_kv: int
    head_dim: int
    ffn: int
    eps: float
    scale: float
    """Of attention scores."""


class Batch(NamedTuple):
    """A batch whose tensors were checked; it keeps them alive."""

    addresses: tuple[int, ...]
    n_rows: int
    keep: LayerRows


class Layers:
    """The layers of one shard with their KV cache."""

    def __init__(
        self,
        shape: LayerShape,
        layers: Sequence[LayerParts],
        k_LKB: torch.Tensor,
        v_LKB: torch.Tensor,
        cos_PD: torch.Tensor,
        sin_PD: torch.Tensor,
        kv_of_head_Q: torch.Tensor,
    ) -> None:
        """`k_LKB`, `v_LKB`: the slabs of all layers, [layers, n_kv, blocks, ...] as `rope_write_kv` takes each.

        Raises ValueError for what is not native (`native_layers` tells beforehand) or does not fit together.
        """
        if not native_layers(shape, layers, k_LKB):
            raise ValueError("these layers are not native: packed weights on the CPU, heads a multiple of 16 wide")
        s, half = shape, shape.head_dim // 2
        kv, _, _, _, blocks, elements = kv_slabs(k_LKB[0], v_LKB[0], s.head_dim) if s.n_kv else (0, 0, 0, 0, 0, 0)
        position = cos_PD.shape[0]
        self._shape = shape
        self._isa = _native.isa()
        self.count = len(layers)
        self._keep = (tuple(layers), k_LKB, v_LKB, cos_PD, sin_PD, kv_of_head_Q)
        given = [_layer(s, w, k_LKB[i], v_LKB[i]) for i, w in enumerate(layers)]
        self._native = _native.Layers(
            given, s.hidden, s.n_q, s.n_kv, s.head_dim, s.ffn, position, blocks, blocks * elements, s.eps, s.scale, kv,
            dense("cos_PD", cos_PD, position, half), dense("sin_PD", sin_PD, position, half),
            ints("kv_of_head_Q", kv_of_head_Q, s.n_q),
        )  # fmt: skip

    def batch(self, rows: LayerRows) -> Batch:
        """Check a batch once for all its layers. Raises ValueError."""
        n, real, sequences = rows.n_rows, rows.n_real, rows.start_R.shape[0]
        width = rows.tables_RM.shape[-1]
        if not 0 <= real <= n:
            raise ValueError(f"{real} real rows of {n}")
        if self._isa != _native.isa():
            raise ValueError(f"these layers were made for {self._isa}, {_native.isa()} is in use; make them again")
        addresses = (
            ints("positions_T", rows.positions_T, n), ints("kv_slot_T", rows.kv_slot_T, n),
            ints("cu_R", rows.cu_R, sequences + 1), ints("start_R", rows.start_R, sequences),
            ints("tables_RM", rows.tables_RM, sequences, width), n, real, sequences, width,
        )  # fmt: skip
        return Batch(addresses, n, rows)

    def attention(
        self, layer: int, batch: Batch, x_TH: torch.Tensor, delta_TH: torch.Tensor | None, out_TH: torch.Tensor
    ) -> None:
        """x += delta; out = this shard's part of attention over the norm of x; writes the rows' K and V."""
        delta = 0 if delta_TH is None else self._rows("delta_TH", delta_TH, batch)
        x, out = self._rows("x_TH", x_TH, batch), self._rows("out_TH", out_TH, batch)
        self._native.attention(layer, batch.addresses, x, delta, out)

    def mlp(self, layer: int, batch: Batch, x_TH: torch.Tensor, delta_TH: torch.Tensor, out_TH: torch.Tensor) -> None:
        """x += delta; out = this shard's part of the feed-forward network over the norm of x."""
        x, out = self._rows("x_TH", x_TH, batch), self._rows("out_TH", out_TH, batch)
        self._native.mlp(layer, batch.addresses, x, self._rows("delta_TH", delta_TH, batch), out)

    def run(self, batch: Batch, x_TH: torch.Tensor) -> None:
        """All layers of a shard without peers; x is updated in place."""
        self._native.run(batch.addresses, self._rows("x_TH", x_TH, batch))

    def run_with_peers(
        self, batch: Batch, x_TH: torch.Tensor, sum_at: int, group_at: int, floor_ns: int
    ) -> NDArray[np.int64] | None:
        """All layers, the parts of each half summed over the group by a transport's own native function.

        `sum_at`: the address of that function, `Peers::sum` of native/layer.h; `group_at`: of what it is called for,
        with `floor_ns`. Returns what it stamped, [2 * layers, 5], or None where a sum failed: the transport knows why.
        """
        stamps = np.empty((2 * self.count, 5), np.int64)
        x = self._rows("x_TH", x_TH, batch)
        done = self._native.run_with_peers(batch.addresses, x, sum_at, group_at, floor_ns, stamps.ctypes.data)
        return stamps if done else None

    def _rows(self, name: str, t: torch.Tensor, batch: Batch) -> int:
        if t.dtype is not torch.float32 or not t.is_cpu:
            fail(name, t, "float32 on cpu")
        return dense(name, t, batch.n_rows, self._shape.hidden)


def native_layers(shape: LayerShape, layers: Sequence[LayerParts], k_LKB: torch.Tensor) -> bool:
    """True if `Layers` takes these: every matrix packed for the instruction set in use, heads a multiple of 16 wide."""
    if shape.head_dim % 16 or shape.head_dim > MAX_HEAD_DIM or not k_LKB.is_cpu:
        return False
    matrices = [m for w in layers for m in (w.qkv_CH, w.o_HQ) if shape.n_q]
    matrices += [m for w in layers for m in (w.gate_up_FH, w.down_HF) if shape.ffn]
    return all(m.columns and m.isa == _native.isa() for m in matrices)


def _layer(shape: LayerShape, w: LayerParts, k: torch.Tensor, v: torch.Tensor) -> tuple[object, ...]:
    s, dim = shape, shape.head_dim
    if s.n_kv:
        _, k_at, v_at, heads, _, _ = kv_slabs(k, v, dim)
        if heads != s.n_kv:
            fail("k_LKB", k, f"of {s.n_kv} KV heads")
    else:
        k_at = v_at = 0
    return (
        _matrix("qkv_CH", w.qkv_CH, w.qkv_bias_C, (s.n_q + 2 * s.n_kv) * dim, s.hidden, bool(s.n_q)),
        _matrix("o_HQ", w.o_HQ, w.o_bias_H, s.hidden, s.n_q * dim, bool(s.n_q)),
        _matrix("gate_up_FH", w.gate_up_FH, w.gate_up_bias_F, 2 * s.ffn, s.hidden, bool(s.ffn)),
        _matrix("down_HF", w.down_HF, w.down_bias_H, s.hidden, s.ffn, bool(s.ffn)),
        _vector("attn_norm_H", w.attn_norm_H, s.hidden),
        _vector("mlp_norm_H", w.mlp_norm_H, s.hidden),
        _vector("q_norm_D", w.q_norm_D, dim),
        _vector("k_norm_D", w.k_norm_D, dim),
        k_at,
        v_at,
    )


def _matrix(
    name: str, weight: PackedWeight, bias_N: torch.Tensor | None, n: int, k: int, used: bool
) -> tuple[int, int, int, int, int, int]:
    bias = _vector(f"bias of {name}", bias_N, n)
    if not used:
        return 0, bias, n, k, 0, 0
    if (weight.n, weight.k) != (n, k):
        raise ValueError(f"{name} is [{weight.n}, {weight.k}]; it must be [{n}, {k}]")
    return weight.data.data_ptr(), bias, n, k, _KINDS[weight.data.dtype], weight.group


def _vector(name: str, t: torch.Tensor | None, size: int) -> int:
    if t is None:
        return 0
    if t.dtype is not torch.float32 or not t.is_cpu:
        fail(name, t, "float32 on cpu")
    return dense(name, t, size)
