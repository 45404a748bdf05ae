"""Kernels that treat each row by itself: norms, rotary embedding with the KV write, SwiGLU's product.

Shape suffixes: T rows, H hidden, C fused projection columns, P positions of the tables, D head size (of a table: half
of it), Q query heads, F feed-forward columns. fp32 on the CPU runs natively (with a KV cache of fp32, bf16 or int8),
everything else in `reference`.
"""

import torch

from evener.kernels import _native, reference
from evener.kernels.checks import dense, fail, ints, kv_slabs, native, row_stride

MAX_HEAD_DIM = 1024


def rms_norm(x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor) -> None:
    """out = x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    x and out are [T, H], or [T, heads, D] for a norm per head; their last dimension is contiguous, the others may
    be strided (views of a wider tensor). They may be the same tensor. Raises ValueError.
    """
    if not native(x_TH, weight_H, out_TH):
        return reference.rms_norm(x_TH, weight_H, eps, out_TH)
    shape, width = x_TH.shape, weight_H.shape[0]
    if out_TH.shape != shape or len(shape) not in (2, 3) or shape[-1] != width:
        fail(
            "out_TH" if shape[-1] == width else "x_TH",
            out_TH,
            f"[T, {width}] or [T, heads, {width}], as x_TH and weight_H",
        )
    *x_strides, x_step = x_TH.stride()
    *out_strides, out_step = out_TH.stride()
    if (x_step != 1 or out_step != 1) and width > 1:
        fail("x_TH" if x_step != 1 else "out_TH", x_TH if x_step != 1 else out_TH, "contiguous in its last dimension")
    inner = shape[1] if len(shape) == 3 else 1
    _native.norm(
        x_TH.data_ptr(), 0, dense("weight_H", weight_H, width), out_TH.data_ptr(), shape[0] * inner, max(inner, 1),
        width, x_strides[0], x_strides[-1], out_strides[0], out_strides[-1], 0, eps,
    )  # fmt: skip
    return None


def add_rms_norm(
    residual_TH: torch.Tensor, x_TH: torch.Tensor, weight_H: torch.Tensor, eps: float, out_TH: torch.Tensor
) -> None:
    """residual += x, in place; out = rms_norm(residual). All [T, H] with contiguous rows. Raises ValueError."""
    if not native(residual_TH, x_TH, weight_H, out_TH):
        return reference.add_rms_norm(residual_TH, x_TH, weight_H, eps, out_TH)
    rows, width = x_TH.shape
    _native.norm(
        x_TH.data_ptr(), residual_TH.data_ptr(), dense("weight_H", weight_H, width), out_TH.data_ptr(), rows, 1, width,
        row_stride("x_TH", x_TH, rows, width), 0, row_stride("out_TH", out_TH, rows, width), 0,
        row_stride("residual_TH", residual_TH, rows, width), eps,
    )  # fmt: skip
    return None


def rope_write_kv(
    qkv_TC: torch.Tensor,
    cos_PD: torch.Tensor,
    sin_PD: torch.Tensor,
    positions_T: torch.Tensor,
    kv_slot_T: torch.Tensor,
    k_slab: torch.Tensor,
    v_slab: torch.Tensor,
    n_q: int,
    n_kv: int,
    q_out_TQD: torch.Tensor,
    q_norm_D: torch.Tensor | None = None,
    k_norm_D: torch.Tensor | None = None,
    eps: float = 1e-6,
) -> None:
    """Rotate Q and K, and write K and V where the KV cache wants them.

    `qkv_TC` [T, (n_q + 2 n_kv) D] holds the query heads, then K, then V; `cos_PD`, `sin_PD` [max_position, D / 2]; the
    pairs are (i, i + D / 2), as in Hugging Face. With `q_norm_D`, `k_norm_D` [D], each head passes an RMS norm first
    (Qwen3). `positions_T`, `kv_slot_T` int32 [T]; slot = block * 16 + offset, -1 writes no K and V.
    Writes `q_out_TQD` [T, n_q, D], `k_slab` [n_kv, blocks, D, 16] and `v_slab` [n_kv, blocks, 16, D], fp32 or bf16; or
    both int8, [n_kv, blocks, 16 * (D + 4)]: 16 x D values as `reference.key_places` and `reference.value_places` say,
    then an fp32 scale for each of the 16 tokens.
    Raises ValueError, also for a position or slot outside its table.
    """
    given = (q_norm_D, k_norm_D)
    norms = [w for w in given if w is not None]
    if not native(qkv_TC, cos_PD, sin_PD, q_out_TQD, *norms):
        return reference.rope_write_kv(
            qkv_TC,
            cos_PD,
            sin_PD,
            positions_T,
            kv_slot_T,
            k_slab,
            v_slab,
            n_q,
            n_kv,
            q_out_TQD,
            q_norm_D,
            k_norm_D,
            eps,
        )
    rows, _, dim = q_out_TQD.shape
    max_position = cos_PD.shape[0]
    if dim % 2 or dim > MAX_HEAD_DIM:
        raise ValueError(f"head size {dim} must be even and at most {MAX_HEAD_DIM}")
    kind, k, v, heads, blocks, block_elements = kv_slabs(k_slab, v_slab, dim)
    if heads != n_kv:
        fail("k_slab", k_slab, f"of {n_kv} KV heads")
    q_norm, k_norm = (0 if w is None else dense("a norm per head", w, dim) for w in given)
    _native.rope(
        qkv_TC.data_ptr(), dense("cos_PD", cos_PD, max_position, dim // 2),
        dense("sin_PD", sin_PD, max_position, dim // 2), ints("positions_T", positions_T, rows),
        ints("kv_slot_T", kv_slot_T, rows),
        k, v, dense("q_out_TQD", q_out_TQD, rows, n_q, dim), q_norm, k_norm, kind, rows,
        row_stride("qkv_TC", qkv_TC, rows, (n_q + 2 * n_kv) * dim), n_q * dim, blocks * block_elements, n_q, n_kv, dim,
        eps, max_position, blocks * 16,
    )  # fmt: skip
    return None


def silu_mul(gate_up_T2F: torch.Tensor, out_TF: torch.Tensor) -> None:
    """out = silu(gate) * up; the gate is columns [0, F) of `gate_up_T2F`. Contiguous rows. Raises ValueError."""
    if not native(gate_up_T2F, out_TF):
        return reference.silu_mul(gate_up_T2F, out_TF)
    rows, width = out_TF.shape
    _native.silu_mul(
        gate_up_T2F.data_ptr(), out_TF.data_ptr(), rows, width, row_stride("gate_up_T2F", gate_up_T2F, rows, 2 * width),
        row_stride("out_TF", out_TF, rows, width),
    )  # fmt: skip
    return None
