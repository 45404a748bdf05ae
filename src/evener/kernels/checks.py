"""Cheap checks in front of native kernels: a wrong tensor must end in a message, not in somebody's memory."""

from typing import NoReturn

import torch

_FP32 = torch.float32


def native(*tensors: torch.Tensor) -> bool:
    """True if the native kernels take these tensors: all fp32, all on the CPU."""
    for t in tensors:  # noqa: SIM110 - all() with a generator takes three times as long
        if t.dtype is not _FP32 or not t.is_cpu:
            return False
    return True


_KV = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}


def kv_slabs(k_slab: torch.Tensor, v_slab: torch.Tensor, dim: int) -> tuple[int, int, int, int, int, int]:
    """(kind, addresses of K and V, KV heads, blocks, elements of a block) of contiguous slabs of one dtype on the CPU.

    fp32 and bf16: [n_kv, blocks, dim, 16] and [n_kv, blocks, 16, dim]; int8: [n_kv, blocks, 16 * (dim + 4)] both.
    """
    kind = _KV.get(k_slab.dtype, -1)
    heads, blocks = k_slab.shape[:2] if k_slab.dim() > 1 else (0, 0)
    k_shape, v_shape = ((16 * (dim + 4),),) * 2 if kind == 2 else ((dim, 16), (16, dim))
    if kind < 0 or not k_slab.is_cpu:
        fail("k_slab", k_slab, "float32, bfloat16 or int8 on cpu")
    if v_slab.dtype is not k_slab.dtype or not v_slab.is_cpu:
        fail("v_slab", v_slab, f"{str(k_slab.dtype).removeprefix('torch.')} on cpu, as k_slab")
    k, v = dense("k_slab", k_slab, heads, blocks, *k_shape), dense("v_slab", v_slab, heads, blocks, *v_shape)
    return kind, k, v, heads, blocks, 16 * (dim + 4) if kind == 2 else 16 * dim


def fail(name: str, tensor: torch.Tensor, want: str) -> NoReturn:
    """Raise ValueError: what `name` is and what it must be."""
    raise ValueError(
        f"{name} is {str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)} with strides {tensor.stride()} "
        f"on {tensor.device}; it must be {want}"
    )


def dense(name: str, tensor: torch.Tensor, *shape: int) -> int:
    """The address of a contiguous tensor of exactly this shape."""
    if tensor.shape != shape or not tensor.is_contiguous():
        fail(name, tensor, f"contiguous {shape}")
    return tensor.data_ptr()


def ints(name: str, tensor: torch.Tensor, *shape: int) -> int:
    """The address of a contiguous int32 CPU tensor of exactly this shape."""
    if tensor.dtype is not torch.int32 or not tensor.is_cpu or tensor.shape != shape or not tensor.is_contiguous():
        fail(name, tensor, f"contiguous int32 {shape} on cpu (use .to(torch.int32).contiguous())")
    return tensor.data_ptr()


def row_stride(name: str, tensor: torch.Tensor, rows: int, width: int) -> int:
    """The distance of rows of a [rows, width] tensor whose rows are contiguous."""
    if tensor.shape != (rows, width):
        fail(name, tensor, f"({rows}, {width})")
    stride, step = tensor.stride()
    if step != 1 and width > 1:
        fail(name, tensor, f"({rows}, {width}) with contiguous rows")
    return stride
