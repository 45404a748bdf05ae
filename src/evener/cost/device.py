"""Times of the phases of a model on one device, by rows: the leaves of the cost model. Pure."""

import numpy as np
from numpy.typing import NDArray

from evener.cost.rates import DeviceProfile, Floats
from evener.errors import InvalidInput
from evener.spec.model import DTYPE_BYTES, ModelSpec, kv_token_bytes

ACTIVATION_BYTES = 4
"""Activations and collectives are fp32, but for GPUs that compute in 16 or 8 bits: theirs take two bytes."""
ATTENTION_OPS, FFN_OPS, EMBED_OPS, HEAD_OPS, CHUNK_OPS = 5, 4, 2, 4, 4
"""Operators started per phase; `CHUNK_OPS` per prefill chunk and batch, for its index tensors."""


class DeviceCosts:
    """Times of the phases on one device, in float nanoseconds; `rows` may be an array."""

    def __init__(
        self, device: DeviceProfile, model: ModelSpec, *, alone: bool, dtype: str = "fp32", kv_dtype: str = "fp32"
    ) -> None:
        for what, given in (("dtype", dtype), ("kv_dtype", kv_dtype)):
            if given not in DTYPE_BYTES:
                raise InvalidInput(f"{what}={given!r} is not one of {', '.join(DTYPE_BYTES)}")
        self.model, self.dtype, self.rates = model, dtype, device.rates(alone)
        self.stretch = device.stretch(alone)
        self.lost = device.lost(alone)
        self.kv_bytes = kv_token_bytes(model.head_dim, kv_dtype)
        self.attention = self.rates.attention_over(kv_dtype)
        self.published = device.peaks is not None
        self.activation_bytes = 2 if device.kind == "cuda" and dtype != "fp32" else ACTIVATION_BYTES

    def _phase(self, rows: NDArray[np.int64], weights: int, values_per_row: int, ops: int) -> Floats:
        """GEMMs over `weights` elements, elementwise traffic of `values_per_row`, and `ops` operator starts."""
        if weights == 0:
            return no_time(rows)
        elementwise = rows * (values_per_row * self.activation_bytes / self.rates.read_bandwidth * 1e9)
        time = self.rates.gemm_ns(self.dtype, rows) * weights + elementwise + ops * self.rates.op_ns
        out: Floats = np.where(rows > 0, time * self.stretch, 0.0)
        return out

    def attention_rows(self, rows: NDArray[np.int64], heads: int, kv_heads: int) -> Floats:
        """One layer's attention block without attention itself: norm, q, k, v and o projections."""
        wide = self.model.head_dim * (2 * heads + 2 * kv_heads)
        return self._phase(rows, self.model.hidden * wide, 4 * self.model.hidden + wide, ATTENTION_OPS)

    def pair_ns(self, heads: int) -> float:
        """One layer's prefill attention, per (query token, key) pair."""
        return heads * 4 * self.model.head_dim / self.attention.flops * 1e9 * self.stretch

    def key_ns(self, heads: int, kv_heads: int) -> float:
        """One layer's decode attention, per key read by a decoding row: bound by bytes or by flop."""
        read = kv_heads * 2 * self.kv_bytes / self.attention.bandwidth * 1e9
        return max(read * self.stretch, self.pair_ns(heads))

    def step_rows(self, rows: NDArray[np.int64]) -> Floats:
        """What the worker computes for a batch beside its operators, once a stage."""
        out: Floats = np.where(rows > 0, self.rates.step_ns * self.stretch, 0.0)
        return out

    def ffn_rows(self, rows: NDArray[np.int64], columns: int) -> Floats:
        """One layer's feed-forward block over `columns` of the intermediate size."""
        return self._phase(rows, 3 * self.model.hidden * columns, 4 * self.model.hidden + 3 * columns, FFN_OPS)

    def embed_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """Looking rows up: bytes only."""
        if vocabulary == 0:
            return no_time(rows)
        copied = rows * (2 * self.model.hidden * self.activation_bytes / self.rates.read_bandwidth * 1e9)
        out: Floats = np.where(rows > 0, (copied + EMBED_OPS * self.rates.op_ns) * self.stretch, 0.0)
        return out

    def head_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """Logits of `rows` sampled rows over `vocabulary` rows of the head, read once more to choose."""
        return self._phase(rows, self.model.hidden * vocabulary, 2 * vocabulary, HEAD_OPS)


def no_time(rows: NDArray[np.int64]) -> Floats:
    """Zeros for so many entries."""
    return np.zeros(len(rows), dtype=np.float64)
