"""The weights of one shard: sharding stands here, beside the maths.

Each tensor is read from the mapped file as the interval that the shard computes with, straight into its place; the
whole model is never in memory once per rank.

Shape suffixes: H hidden, V a vocabulary interval, D head_dim, Q query-head width (n_q * D), C fused q, k, v width
((n_q + 2 n_kv) * D), F FFN columns of the shard.
"""

from typing import NamedTuple

import torch

from evener.kernels import PackedWeight, pack_weight
from evener.model.families.base import EMBED, FINAL_NORM, HEAD, layer_name
from evener.model.source import ModelSource
from evener.spec.model import QUANT_GROUP, ModelSpec, ffn_group, whole_group
from evener.spec.plan import Interval, Shard, Stage, size


class LayerWeights(NamedTuple):
    """One layer, one shard. Biases of split inputs (o, down) are held by the group's first rank alone."""

    attn_norm_H: torch.Tensor
    qkv_CH: PackedWeight
    qkv_bias_C: torch.Tensor | None
    q_norm_D: torch.Tensor | None
    k_norm_D: torch.Tensor | None
    o_HQ: PackedWeight
    o_bias_H: torch.Tensor | None
    mlp_norm_H: torch.Tensor
    gate_up_FH: PackedWeight
    """[2F, H]: the gate's rows, then up's."""
    gate_up_bias_F: torch.Tensor | None
    down_HF: PackedWeight
    down_bias_H: torch.Tensor | None


class Reader(NamedTuple):
    """Reads and fuses pieces of tensors onto a device: matrices in `dtype`, norms and biases in fp32."""

    source: ModelSource
    dtype: torch.dtype
    device: torch.device

    def one(self, name: str, rows: Interval | None = None, cols: Interval | None = None) -> torch.Tensor:
        """[rows, cols) of one tensor, fp32."""
        return self.source.read(name, rows, cols).to(self.device)

    def fused(self, parts: list[tuple[str, Interval]], *trailing: int) -> torch.Tensor:
        """Rows of several tensors one below the other, fp32, read one at a time. `trailing`: the shape of a row."""
        out = torch.empty(sum(size(rows) for _, rows in parts), *trailing, device=self.device)
        at = 0
        for name, rows in parts:
            if n := size(rows):
                out[at : at + n] = self.source.read(name, rows)
            at += n
        return out

    def packed(self, weight_NK: torch.Tensor, group: int = QUANT_GROUP) -> PackedWeight:
        """The matrix as products take it, rounded or quantised to `dtype`, there with a scale per `group` of inputs."""
        return pack_weight(weight_NK, self.dtype, group)


def load_layer(read: Reader, spec: ModelSpec, layer: int, shard: Shard, rank: int) -> LayerWeights:
    """The shard's part of one layer. `rank` is the shard's place in its tensor-parallel group."""
    dim = spec.head_dim
    kv_a, kv_b = shard.kv_heads(spec)
    q, kv = (shard.heads[0] * dim, shard.heads[1] * dim), (kv_a * dim, kv_b * dim)

    def name(part: str) -> str:
        return layer_name(layer, part)

    def qkv(suffix: str) -> list[tuple[str, Interval]]:
        return [(name(f"self_attn.{p}_proj.{suffix}"), rows) for p, rows in (("q", q), ("k", kv), ("v", kv))]

    def gate_up(suffix: str) -> list[tuple[str, Interval]]:
        return [(name(f"mlp.{p}_proj.{suffix}"), shard.ffn) for p in ("gate", "up")]

    first, wide = rank == 0, whole_group(spec.hidden)
    return LayerWeights(
        attn_norm_H=read.one(name("input_layernorm.weight")),
        qkv_CH=read.packed(read.fused(qkv("weight"), spec.hidden), wide),
        qkv_bias_C=read.fused(qkv("bias")) if spec.qkv_bias else None,
        q_norm_D=read.one(name("self_attn.q_norm.weight")) if spec.qk_norm else None,
        k_norm_D=read.one(name("self_attn.k_norm.weight")) if spec.qk_norm else None,
        o_HQ=read.packed(read.one(name("self_attn.o_proj.weight"), None, q)),
        o_bias_H=read.one(name("self_attn.o_proj.bias")) if spec.o_bias and first else None,
        mlp_norm_H=read.one(name("post_attention_layernorm.weight")),
        gate_up_FH=read.packed(read.fused(gate_up("weight"), spec.hidden), wide),
        gate_up_bias_F=read.fused(gate_up("bias")) if spec.mlp_bias else None,
        down_HF=read.packed(read.one(name("mlp.down_proj.weight"), None, shard.ffn), ffn_group(spec.ffn)),
        down_bias_H=read.one(name("mlp.down_proj.bias")) if spec.mlp_bias and first else None,
    )


class Table(NamedTuple):
    """Vocabulary rows [start, start + size) of `weight`, which may hold more on either side."""

    weight: PackedWeight
    start: int
    size: int


class EndWeights(NamedTuple):
    """What only the first and the last stage hold."""

    embed: Table | None
    final_norm_H: torch.Tensor | None
    head: Table | None


def load_ends(read: Reader, spec: ModelSpec, shard: Shard, first_stage: bool, last_stage: bool) -> EndWeights:
    """Embedding rows, final norm and head rows of a shard. Tied rows that are held as both are stored once."""
    embed, head = shard.embed_rows, shard.head_rows
    norm_H = read.one(FINAL_NORM) if last_stage else None
    wide = whole_group(spec.hidden)
    if first_stage and last_stage and spec.tied and max(embed[0], head[0]) < min(embed[1], head[1]):
        low = min(embed[0], head[0])
        both = read.packed(read.one(EMBED, (low, max(embed[1], head[1]))), wide)
        weight, start = both.part(head[0] - low, head[1] - low)
        return EndWeights(Table(both, embed[0] - low, size(embed)), norm_H, Table(weight, start, size(head)))

    def table(name: str, rows: Interval) -> Table:
        return Table(read.packed(read.one(name, rows), wide), 0, size(rows))

    return EndWeights(
        table(EMBED, embed) if first_stage else None,
        norm_H,
        table(EMBED if spec.tied else HEAD, head) if last_stage else None,
    )


class ShardWeights(NamedTuple):
    """All weights of one shard."""

    layers: list[LayerWeights]
    ends: EndWeights


def load_shard(
    read: Reader, spec: ModelSpec, stage: Stage, shard: Shard, rank: int, first_stage: bool, last_stage: bool
) -> ShardWeights:
    """The shard's part of every layer of its stage, and of what stands before the first and behind the last."""
    ends = load_ends(read, spec, shard, first_stage, last_stage)  # first: it needs the most room beside itself
    return ShardWeights([load_layer(read, spec, layer, shard, rank) for layer in range(*stage.layers)], ends)
