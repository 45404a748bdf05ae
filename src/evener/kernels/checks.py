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
