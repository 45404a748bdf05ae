"""The hot path on CPUs: native kernels, each with a torch reference that defines it.

A function runs natively for fp32 tensors on the CPU (weights and KV cache may be bf16 or int8 there), and in
`reference` for every other device or dtype. Read
`rows` (norms, rotary embedding and KV write, SwiGLU), `gemm`, `attention`, `sampling`, `layers` (all of them at once),
then `reference`; the C++ is in `native/`: `kernels.h` says what each instruction set provides, `launch.cpp` divides the
work among threads, `layer.cpp` puts a layer together.
"""

from evener.kernels.attention import paged_attention
from evener.kernels.gemm import MAX_QUANT_GROUP, QUANT_GROUP, PackedWeight, check_packed, huge_copy, linear, pack_weight
from evener.kernels.layers import Layers, LayerShape, native_layers
from evener.kernels.rows import add_rms_norm, rms_norm, rope_write_kv, silu_mul
from evener.kernels.runtime import advise_huge_pages, isa, set_isa, set_threads, threads
from evener.kernels.sampling import (
    argmax_rows,
    choose_rows,
    gumbel_argmax,
    gumbel_noise,
    logsumexp_rows,
    top_candidates,
)

__all__ = [
    "MAX_QUANT_GROUP",
    "QUANT_GROUP",
    "LayerShape",
    "Layers",
    "PackedWeight",
    "add_rms_norm",
    "advise_huge_pages",
    "argmax_rows",
    "check_packed",
    "choose_rows",
    "gumbel_argmax",
    "gumbel_noise",
    "huge_copy",
    "isa",
    "linear",
    "logsumexp_rows",
    "native_layers",
    "pack_weight",
    "paged_attention",
    "rms_norm",
    "rope_write_kv",
    "set_isa",
    "set_threads",
    "silu_mul",
    "threads",
    "top_candidates",
]
