"""Linear layers with packed weights: fp32, bf16 or int8.

Shape suffixes: T rows, K inputs, N outputs.
"""

import math
from collections.abc import Sequence
from threading import Lock

import torch
import torch.nn.functional as F

from evener.kernels import _native
from evener.kernels.checks import dense, fail, row_stride
from evener.kernels.runtime import advise_huge_pages

QUANT_GROUP: int = _native.GROUP
"""Fewest inputs of an int8 product that share a scale, on both sides. Inputs of a split layer are cut on multiples."""
MAX_QUANT_GROUP: int = _native.MAX_GROUP
"""Most inputs that share a scale: the sum of their weights has 16 bits."""


class PackedWeight:
    """A weight [N, K], laid out for the instruction set in use. Made by `pack_weight`.

    `data` is [panels, K, columns] in fp32 and bf16 (with bf16 instructions [panels, ceil(K / 2), columns, 2]),
    [panels, groups, cell bytes] in int8, the last panel padded with zeros. What is not packed (other devices, dtypes)
    stays as it is, with `columns` 0.
    """

    def __init__(self, data: torch.Tensor, n: int, k: int, columns: int, isa: str = "", group: int = 0) -> None:
        self.data = data
        self.n = n
        self.k = k
        self.columns = columns
        """Columns of a panel; 0: not packed."""
        self.isa = isa
        """The instruction set it was packed for."""
        self.group = group
        """Inputs that share a scale; 0: not int8."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes

    def rows(self, index_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight in fp32 (not packed: in its dtype), [T, K]: an embedding's lookup.

        `index_T` int64 in [0, N). Raises ValueError.
        """
        if not self.columns:
            return F.embedding(index_T, self.data)
        if self.data.dtype is not torch.int8:
            return self.data[index_T // self.columns, :, index_T % self.columns].float().flatten(1)[:, : self.k]
        _check_isa(self)
        count = index_T.shape[0]
        out_TK = torch.empty(count, self.k)
        if index_T.dtype is not torch.int64 or not index_T.is_cpu:
            fail("index_T", index_T, "int64 on cpu")
        _native.unpack8(
            self.data.data_ptr(), dense("index_T", index_T, count), count, self.n, self.k, self.group, out_TK.data_ptr()
        )
        return out_TK

    def part(self, start: int, stop: int) -> tuple["PackedWeight", int]:
        """Whole panels that hold rows [start, stop), without a copy, and where `start` is in them."""
        if not self.columns:
            return PackedWeight(self.data[start:stop], stop - start, self.k, 0), 0
        first, last = start // self.columns, -(-stop // self.columns)
        n = min(self.n, last * self.columns) - first * self.columns
        part = PackedWeight(self.data[first:last], n, self.k, self.columns, self.isa, self.group)
        return part, start - first * self.columns


def pack_weight(weight_NK: torch.Tensor, dtype: torch.dtype | None = None, group: int = QUANT_GROUP) -> PackedWeight:
    """Pack a weight in `dtype` (None: its own).

    On the CPU fp32, bf16 and int8 are native: the first two are rounded and stored, and multiplied in fp32 (where the
    processor has bf16 products, `linear` rounds the inputs to bf16 as well and uses them); int8 has a scale per row and
    `group` of inputs, a multiple of QUANT_GROUP up to MAX_QUANT_GROUP, and is quantised here from fp32. Elsewhere the
    weight is cast and kept as it is. Raises ValueError for another group, and for int8 that is not on the CPU or not
    made from fp32.
    """
    dtype = dtype or weight_NK.dtype
    n, k = weight_NK.shape
    if group % QUANT_GROUP or not 0 < group <= MAX_QUANT_GROUP:
        raise ValueError(f"group {group} must be a multiple of {QUANT_GROUP} up to {MAX_QUANT_GROUP}")
    if dtype is torch.int8 and (weight_NK.dtype is not torch.float32 or not weight_NK.is_cpu):
        fail("weight_NK", weight_NK, "float32 on cpu to be quantised")
    if dtype not in (torch.float32, torch.bfloat16, torch.int8) or not weight_NK.is_cpu:
        return PackedWeight(weight_NK.to(dtype), n, k, 0)
    if n == 0 or k == 0:  # nothing to pack: its products are zeros, in fp32 like those of every packed weight
        return PackedWeight(weight_NK.to(torch.float32), n, k, 0)
    columns, isa = _native.gemm_columns(), _native.isa()
    panels = -(-n // columns)
    if dtype is torch.int8:
        packed = _aligned((panels, -(-k // group), _native.cell_bytes(group)), dtype)
        weight_NK = weight_NK.contiguous()
        _native.pack8(weight_NK.data_ptr(), packed.data_ptr(), n, k, group, k)
        return PackedWeight(packed, n, k, columns, isa, group)
    if dtype is torch.bfloat16 and _native.bf16_pairs():
        pairs = _aligned((panels, -(-k // 2), columns, 2), dtype)
        padded_NK = F.pad(weight_NK.to(dtype), (0, k % 2, 0, panels * columns - n))
        pairs.copy_(padded_NK.view(panels, columns, -1, 2).transpose(1, 2))
        return PackedWeight(pairs, n, k, columns, isa)
    packed = _aligned((panels, k, columns), dtype)
    whole = n // columns
    packed[:whole] = weight_NK[: whole * columns].view(whole, columns, k).transpose(1, 2)
    if whole < panels:
        packed[whole] = 0
        packed[whole, :, : n - whole * columns] = weight_NK[whole * columns :].T
    return PackedWeight(packed, n, k, columns, isa)


def linear(x_TK: torch.Tensor, weight: PackedWeight, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias, [T, N], in fp32 where the weight is packed. Rows of x are contiguous. Raises ValueError.

    Over an int8 weight x is quantised too, per row and group: to 16 bits, or to 8 with VNNI instructions; over a bf16
    weight it is rounded to bf16 where the processor has products of these (`isa()` is `avx512bf16` or `avx512amx`). A
    row's result depends neither on the other rows nor on the number of threads. Values of x that are not finite give
    NaN.
    """
    if not weight.columns:
        return F.linear(x_TK, weight.data, bias_N)
    if x_TK.dtype is not torch.float32 or not x_TK.is_cpu:
        fail("x_TK", x_TK, "float32 on cpu, as every packed weight takes it")
    _check_isa(weight)
    rows = x_TK.shape[0]
    out_TN = torch.empty(rows, weight.n)
    if rows:
        bias = 0 if bias_N is None else dense("bias_N", bias_N, weight.n)
        stride = row_stride("x_TK", x_TK, rows, weight.k)
        x, w, out = x_TK.data_ptr(), weight.data.data_ptr(), out_TN.data_ptr()
        kind = weight.data.dtype
        if kind is torch.int8:
            _native.gemm8(x, w, bias, out, rows, weight.n, weight.k, weight.group, stride, weight.n)
        else:
            _native.gemm(x, w, bias, out, rows, weight.n, weight.k, stride, weight.n, kind is torch.bfloat16)
    return out_TN


def _aligned(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Room for a packed weight, on a cache line.

    Weights lie one behind the other in huge pages: a layer's matrices are smaller than one, and with pages of their own
    nearly every one of them is looked up in memory each time that the weights are read (single stream: up to a quarter
    of the time).
    """
    global _room
    size = math.prod(shape) * dtype.itemsize
    whole = -(-size // _LINE) * _LINE
    with _lock:
        if whole > _ROOM_BYTES // 2:
            taken = _huge(whole)[:size]
        else:
            if whole > _room.numel():
                _room = _huge(_ROOM_BYTES)
            taken, _room = _room[:size], _room[whole:]
    return taken.view(dtype).view(*shape)


_LINE, _HUGE_PAGE, _ROOM_BYTES = 64, 2 << 20, 32 << 20
_lock = Lock()
_room = torch.empty(0, dtype=torch.int8)
"""What is left of the last room. A room goes when all weights in it have gone: a model's come and go together."""


def _huge(size: int) -> torch.Tensor:
    """So many bytes from the border of a huge page on; what is never written takes no memory."""
    room = torch.empty(size + _HUGE_PAGE, dtype=torch.int8)
    first = -room.data_ptr() % _HUGE_PAGE
    advise_huge_pages(room)
    return room[first : first + size]


def check_packed(weight: PackedWeight) -> None:
    """Raise ValueError unless `data` is as large as the kernels will take it to be."""
    n, k, columns, data = weight.n, weight.k, weight.columns, weight.data
    if columns == 0:
        wanted: tuple[int, ...] = (n, k)
    elif columns != _native.gemm_columns() or weight.isa != _native.isa():
        raise ValueError(f"packed for {weight.isa}, {columns} columns a panel")
    elif data.dtype is torch.int8:
        if weight.group % QUANT_GROUP or not 0 < weight.group <= MAX_QUANT_GROUP:
            raise ValueError(f"group {weight.group}")
        wanted = (-(-n // columns), -(-k // weight.group), _native.cell_bytes(weight.group))
    elif data.dtype is torch.bfloat16 and _native.bf16_pairs():
        wanted = (-(-n // columns), -(-k // 2), columns, 2)
    else:
        wanted = (-(-n // columns), k, columns)
    if tuple(data.shape) != wanted:
        raise ValueError(f"shape {tuple(data.shape)} for [{n}, {k}] packed, {wanted} is needed")


def huge_copy(data: torch.Tensor) -> torch.Tensor:
    """Packed weights (int8 [bytes], as they lie in a file), copied into huge pages."""
    room = _huge(data.nbytes)
    room.copy_(data)
    return room


def _check_isa(weight: PackedWeight) -> None:
    if weight.isa != _native.isa():
        raise ValueError(
            f"the weight was packed for {weight.isa}, {_native.isa()} is in use; pack it again after set_isa"
        )
