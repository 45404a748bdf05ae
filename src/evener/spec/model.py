"""What a decoder-only model is, as far as planning and execution need to know. No torch."""

import math

from msgspec import Struct

from evener.units import Bytes

DTYPE_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1, "fp8": 1}

QUANT_GROUP = 64
"""Fewest inputs of an int8 product that share a scale (`evener.kernels.QUANT_GROUP`)."""
WIDEST_GROUP = 192
"""Most that do: beyond, perplexity pays for speed that the kernels no longer gain."""
FFN_PARTS = 12
"""Fewest parts that the FFN's columns can be cut into where their groups are wider than QUANT_GROUP."""


def quant_group(dtype: str) -> int:
    """What cuts of the inputs of a split layer must be multiples of, for weights of this dtype."""
    return QUANT_GROUP if dtype == "int8" else 1


def whole_group(inputs: int) -> int:
    """Inputs of an int8 product that share a scale where every rank reads all of them, such as those of qkv, of gate
    and up, of the head: the fewer scales, the faster. The most up to WIDEST_GROUP that divide them evenly."""
    wide = range(WIDEST_GROUP, QUANT_GROUP, -QUANT_GROUP)
    return next((group for group in wide if inputs % group == 0), QUANT_GROUP)


def ffn_group(columns: int) -> int:
    """Inputs of an int8 down_proj that share a scale. Ranks split them, so that cuts fall on multiples of this: twice
    QUANT_GROUP where that divides them and leaves FFN_PARTS to deal out."""
    wide = 2 * QUANT_GROUP
    return wide if columns % wide == 0 and columns >= FFN_PARTS * wide else QUANT_GROUP


def kv_token_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of one token's K or V of one head. In int8 each has an fp32 scale."""
    return head_dim * DTYPE_BYTES[kv_dtype] + (4 if kv_dtype == "int8" else 0)


class RopeScaling(Struct, frozen=True):
    """`rope_type: llama3` scaling (Llama 3.1, transformers `_compute_llama3_parameters`)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position: int


class ModelSpec(Struct, frozen=True):
    """Shape of a decoder-only transformer. Sizes are counts of elements unless named otherwise.

    `kv_heads` divides `heads`; query head h reads KV head `h // (heads // kv_heads)`.
    """

    family: str
    """`llama`, `qwen2`, `qwen3`: a key of `evener.model.families`."""
    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    max_position: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    """The head is the transposed embedding. Tied weights count on every holder."""
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    """RMSNorm per head on queries and keys before the rotation (Qwen3)."""
    quant_group: int = 1
    """Cuts of the inputs of o_proj and down_proj fall on multiples of this (1: anywhere). See `ffn_unit`."""

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @property
    def ffn_unit(self) -> int:
        """FFN columns between legal cuts."""
        return 1 if self.quant_group == 1 else math.lcm(self.quant_group, ffn_group(self.ffn))

    def layer_params(self) -> int:
        """Weights of one layer, elements."""
        attn = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attn + 3 * self.hidden * self.ffn + 2 * self.hidden

    def head_params(self) -> int:
        """Weights of the output head, elements."""
        return self.vocab * self.hidden

    def kv_bytes_per_token(self, kv_dtype: str = "fp32") -> Bytes:
        """Bytes of K and V for one token over all layers and KV heads."""
        return Bytes(2 * self.layers * self.kv_heads * kv_token_bytes(self.head_dim, kv_dtype))
