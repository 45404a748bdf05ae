"""One decoder for every family: pre-norm transformer layers with grouped-query attention and a gated SiLU FFN
(Llama, Touvron et al. 2023). Each rank computes its heads and FFN columns; two sums per layer put the parts together.

Shape suffixes: T rows of the batch, S sampled rows, H hidden, V vocabulary rows of this shard, D head_dim, Q query
heads of this shard, C fused q, k, v width ((Q + 2 KV heads) * D), F FFN columns of this shard.
"""

from typing import Protocol, runtime_checkable

import torch

from evener import kernels
from evener.errors import InvalidInput
from evener.kernels.layers import Batch
from evener.model.inputs import Rows
from evener.model.kv import KVSlabs
from evener.model.packed_file import Kept, packed_weights
from evener.model.rope import rope_tables
from evener.model.source import ModelSource
from evener.model.weights import LayerWeights, Reader, ShardWeights, load_shard
from evener.spec.memory import weight_bytes
from evener.spec.model import ModelSpec
from evener.spec.plan import Shard, Stage, size

TORCH_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_NAME = {kind: name for name, kind in TORCH_DTYPE.items()}


class Group(Protocol):
    """All that the maths needs of a tensor-parallel group (`evener.execute.live.transport.base.Group` is one)."""

    def all_reduce(self, t: torch.Tensor) -> object:
        """Sum over the ranks of the stage, in place; fp32, contiguous."""
        ...


@runtime_checkable
class RunsLayers(Protocol):
    """A group that also runs whole layers with their sums, in native code."""

    def run_layers(self, layers: kernels.Layers, batch: Batch, x_TH: torch.Tensor) -> object:
        """`layers` on `batch`, each half followed by an all_reduce; x_TH is updated in place."""
        ...


class StageModel:
    """The part of a model that one rank of one stage computes.

    All ranks of a stage call `embed` (first stage), `run_layers` and `logits` (last stage) in the same order with the
    same rows, each with its own end of the group, or None where the stage has one rank.
    """

    def __init__(
        self,
        source: ModelSource,
        spec: ModelSpec,
        stage: Stage,
        shard: Shard,
        *,
        first_stage: bool,
        last_stage: bool,
        rank: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_position: int | None = None,
        keep_packed: bool = False,
    ) -> None:
        """Load this shard's weights and nothing more. `rank` is the shard's place in the stage's group.

        `dtype` is that of the matrices: float32, bfloat16 or int8 (`kernels.pack_weight`); activations are fp32.
        `max_position` bounds the positions that will be run (None: all that the model has), and so the rotary tables.
        `keep_packed`: take the weights from the cache of packed ones, or put them there (`packed_file`).

        Raises InvalidInput for a dtype that is not computed in, UnsupportedModel when a weight cannot be read.
        """
        _check_dtype(dtype, device, spec, stage)
        self.spec, self.stage, self.shard, self.rank = spec, stage, shard, rank
        self.device = torch.device(device)
        read = Reader(source, dtype, self.device)

        def load() -> ShardWeights:
            return load_shard(read, spec, stage, shard, rank, first_stage, last_stage)

        if keep_packed and self.device.type == "cpu":
            part = stage.layers, shard.heads, shard.ffn, shard.embed_rows, shard.head_rows, rank == 0
            of = source.opened, spec, part, first_stage, last_stage, dtype
            kept = packed_weights(load, weight_bytes(shard, stage, spec, _NAME[dtype]), source.unchanged, *of)
        else:
            kept = Kept(load(), "packed")
        (self.layers, self.ends), self.weights_from = kept
        cos_PD, sin_PD = rope_tables(spec, max_position or spec.max_position, source.rope_divisors())
        self._cos_PD, self._sin_PD = cos_PD.to(self.device), sin_PD.to(self.device)

        kv_a, kv_b = shard.kv_heads(spec)
        self.n_q, self.n_kv = size(shard.heads), kv_b - kv_a
        heads = torch.arange(*shard.heads, dtype=torch.int32, device=self.device)
        self._kv_of_head = heads // spec.group - kv_a
        self._scale = spec.head_dim**-0.5
        self._kv: KVSlabs | None = None
        self._native: kernels.Layers | None = None

    def allocate_kv(self, n_blocks: int, dtype: torch.dtype = torch.float32) -> KVSlabs:
        """Allocate (or replace) this shard's part of `n_blocks` KV blocks: float32, bfloat16 or int8."""
        self._kv = KVSlabs(len(self.layers), self.n_kv, n_blocks, self.spec.head_dim, self.device, dtype)
        spec = self.spec
        shape = kernels.LayerShape(
            spec.hidden, self.n_q, self.n_kv, spec.head_dim, size(self.shard.ffn), spec.norm_eps, self._scale
        )
        self._native = None
        if kernels.native_layers(shape, self.layers, self._kv.k):
            self._native = kernels.Layers(
                shape, self.layers, self._kv.k, self._kv.v, self._cos_PD, self._sin_PD, self._kv_of_head
            )
        return self._kv

    def embed(self, tokens_T: torch.Tensor, group: Group | None) -> torch.Tensor:
        """Token ids (int64) -> x_TH. Rows of the vocabulary held elsewhere are zero here, and the sum fills them in."""
        embed = self.ends.embed
        assert embed is not None, "embed is for the first stage"
        a, b = self.shard.embed_rows
        if group is None:
            assert (a, b) == (0, self.spec.vocab), f"embedding rows [{a}, {b}) of {self.spec.vocab} and no group"
            return embed.weight.rows(tokens_T + embed.start)
        x_TH = torch.zeros(tokens_T.shape[0], self.spec.hidden, device=self.device)
        here_T = (tokens_T >= a) & (tokens_T < b)
        x_TH[here_T] = embed.weight.rows(tokens_T[here_T] + (embed.start - a))
        group.all_reduce(x_TH)
        return x_TH

    def run_layers(self, x_TH: torch.Tensor, rows: Rows, group: Group | None) -> torch.Tensor:
        """Run the stage's layers; writes the rows' K and V into the cache. `x_TH` is updated in place and returned."""
        if self._native is not None:
            return _run_native(self._native, len(self.layers), x_TH, rows, group)
        eps = self.spec.norm_eps
        normed_TH = torch.empty_like(x_TH)
        kernels.rms_norm(x_TH, self.layers[0].attn_norm_H, eps, normed_TH)
        for i, w in enumerate(self.layers):
            attn_TH = self._attention(i, w, normed_TH, rows)
            _sum(attn_TH, group)
            kernels.add_rms_norm(x_TH, attn_TH, w.mlp_norm_H, eps, normed_TH)

            mlp_TH = self._mlp(w, normed_TH)
            _sum(mlp_TH, group)
            if i + 1 < len(self.layers):
                kernels.add_rms_norm(x_TH, mlp_TH, self.layers[i + 1].attn_norm_H, eps, normed_TH)
            else:
                x_TH += mlp_TH
        return x_TH

    def logits(self, x_TH: torch.Tensor, sample_S: torch.Tensor, group: Group | None = None) -> torch.Tensor:
        """Logits_SV of the chosen rows over this shard's head rows. Nothing is gathered here (`group` stays unused)."""
        norm_H, head = self.ends.final_norm_H, self.ends.head
        assert norm_H is not None and head is not None, "logits is for the last stage"
        x_SH = x_TH[sample_S]
        normed_SH = torch.empty_like(x_SH)
        kernels.rms_norm(x_SH, norm_H, self.spec.norm_eps, normed_SH)
        return kernels.linear(normed_SH, head.weight)[:, head.start : head.start + head.size]

    def _attention(self, i: int, w: LayerWeights, normed_TH: torch.Tensor, rows: Rows) -> torch.Tensor:
        """This shard's heads of self-attention, before the sum over the group."""
        if not self.n_q:
            return self._nothing(normed_TH, w.o_bias_H)
        assert self._kv is not None, "allocate_kv comes before the first batch"
        k_slab, v_slab = self._kv.k[i], self._kv.v[i]
        n = rows.n_real  # padding rows take part in the GEMMs only
        qkv_TC = kernels.linear(normed_TH, w.qkv_CH, w.qkv_bias_C)
        q_TQD = torch.empty(n, self.n_q, self.spec.head_dim, device=self.device)
        kernels.rope_write_kv(
            qkv_TC[:n], self._cos_PD, self._sin_PD, rows.positions_T[:n], rows.kv_slot_T[:n], k_slab, v_slab,
            self.n_q, self.n_kv, q_TQD, q_norm_D=w.q_norm_D, k_norm_D=w.k_norm_D, eps=self.spec.norm_eps,
        )  # fmt: skip
        out_TQD = torch.zeros(rows.n_rows, self.n_q, self.spec.head_dim, device=self.device)
        kernels.paged_attention(
            q_TQD, k_slab, v_slab, rows.cu_R, rows.start_R, rows.tables_RM, self._kv_of_head, self._scale, out_TQD[:n]
        )
        return kernels.linear(out_TQD.flatten(1), w.o_HQ, w.o_bias_H)

    def _mlp(self, w: LayerWeights, normed_TH: torch.Tensor) -> torch.Tensor:
        """This shard's columns of the feed-forward network, before the sum over the group."""
        columns = size(self.shard.ffn)
        if not columns:
            return self._nothing(normed_TH, w.down_bias_H)
        gate_up_T2F = kernels.linear(normed_TH, w.gate_up_FH, w.gate_up_bias_F)
        act_TF = torch.empty(gate_up_T2F.shape[0], columns, device=self.device)
        kernels.silu_mul(gate_up_T2F, act_TF)
        return kernels.linear(act_TF, w.down_HF, w.down_bias_H)

    def _nothing(self, like_TH: torch.Tensor, bias_H: torch.Tensor | None) -> torch.Tensor:
        """The part of a shard that computes nothing here, and still joins the sum."""
        zeros_TH = torch.zeros_like(like_TH)
        return zeros_TH if bias_H is None else zeros_TH + bias_H


def _run_native(
    layers: kernels.Layers, count: int, x_TH: torch.Tensor, rows: Rows, group: Group | None
) -> torch.Tensor:
    """The same as `StageModel.run_layers` in a few calls: what follows there step by step is one kernel here."""
    batch = layers.batch(rows)
    if group is None:
        layers.run(batch, x_TH)
        return x_TH
    if isinstance(group, RunsLayers):
        group.run_layers(layers, batch, x_TH)
        return x_TH
    attn_TH, mlp_TH = torch.empty_like(x_TH), torch.empty_like(x_TH)
    for i in range(count):
        layers.attention(i, batch, x_TH, mlp_TH if i else None, attn_TH)
        group.all_reduce(attn_TH)
        layers.mlp(i, batch, x_TH, attn_TH, mlp_TH)
        group.all_reduce(mlp_TH)
    x_TH += mlp_TH
    return x_TH


def _check_dtype(dtype: torch.dtype, device: torch.device | str, spec: ModelSpec, stage: Stage) -> None:
    cpu = torch.device(device).type == "cpu"
    known = (torch.float32, torch.bfloat16, torch.int8) if cpu else (torch.float32,)
    if dtype not in known:
        raise InvalidInput(f"dtype {dtype} is not supported on {device}; supported: {', '.join(map(str, known))}")
    if dtype is torch.int8 and len(stage.shards) > 1 and spec.quant_group % kernels.QUANT_GROUP:
        raise InvalidInput(
            f"an int8 stage of {len(stage.shards)} shards needs cuts on whole groups of {kernels.QUANT_GROUP}, "
            f"the plan was checked for {spec.quant_group}; set the model's quant_group"
        )


def _sum(t: torch.Tensor, group: Group | None) -> None:
    """Sum over the ranks of the stage, in place."""
    if group is not None:
        group.all_reduce(t)
