"""Causal attention over the paged KV cache, for batches that mix prefill chunks and decoding rows."""

import torch

from evener.kernels import _native, reference
from evener.kernels.checks import dense, ints, kv_slabs, native


def paged_attention(
    q_TQD: torch.Tensor,
    k_slab: torch.Tensor,
    v_slab: torch.Tensor,
    cu_R: torch.Tensor,
    start_R: torch.Tensor,
    tables_RM: torch.Tensor,
    kv_of_head: torch.Tensor,
    scale: float,
    out_TQD: torch.Tensor,
) -> None:
    """out = softmax(scale * q k^T) v, where the query at position p reads keys 0..p of its sequence.

    Sequence r has query rows cu_R[r] .. cu_R[r + 1] at positions start_R[r] and up; its keys, those of these rows
    included, are already in the blocks of tables_RM[r]. Query head h reads KV head kv_of_head[h]: any mapping;
    consecutive heads of one KV head are computed together.
    q, out [T, Q, D]; k_slab [n_kv, blocks, D, 16], v_slab [n_kv, blocks, 16, D]; int32 cu_R [R + 1], start_R [R],
    tables_RM [R, M], kv_of_head [Q]. Rows of `out` beyond cu_R[-1] are left untouched. Slabs may be bf16, or int8 as
    `rope_write_kv` writes them.

    Native for fp32 queries on the CPU when D is a multiple of 16; then a row's result does not depend, in any bit, on
    the rest of the batch, on how the prompt was cut into chunks, or on the number of threads. Raises ValueError, also
    for a block or KV head that does not exist.
    """
    rows, heads, dim = q_TQD.shape
    if dim % 16 or not native(q_TQD, out_TQD):
        return reference.paged_attention(q_TQD, k_slab, v_slab, cu_R, start_R, tables_RM, kv_of_head, scale, out_TQD)
    kind, k, v, kv_heads, blocks, block_elements = kv_slabs(k_slab, v_slab, dim)
    sequences = start_R.shape[0]
    width = tables_RM.shape[-1]
    _native.attention(
        dense("q_TQD", q_TQD, rows, heads, dim), k, v, dense("out_TQD", out_TQD, rows, heads, dim), heads * dim,
        heads * dim, blocks * block_elements, dim, scale, kind, ints("cu_R", cu_R, sequences + 1),
        ints("start_R", start_R, sequences),
        ints("tables_RM", tables_RM, sequences, width), ints("kv_of_head", kv_of_head, heads), sequences, width, heads,
        kv_heads, blocks, rows,
    )  # fmt: skip
    return None
