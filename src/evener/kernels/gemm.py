"""Linear layers with packed weights.

Shape suffixes: T rows, K inputs, N outputs, B panels of the packed weight.
"""

import torch
import torch.nn.functional as F

from evener.kernels import _native
from evener.kernels.checks import dense, fail, row_stride
from evener.kernels.runtime import advise_huge_pages


class PackedWeight:
    """A weight [N, K], laid out for the instruction set in use: [panels, K, columns], the last panel padded with zeros.

    On other devices and dtypes it is kept as it is. Made by `pack_weight`.
    """

    def __init__(self, data: torch.Tensor, n: int, k: int, columns: int) -> None:
        self.data = data
        self.n = n
        self.k = k
        self.columns = columns
        """Columns of a panel; 0: not packed."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.data.nbytes

    def rows(self, index_T: torch.Tensor) -> torch.Tensor:
        """Rows of the weight, [T, K]: an embedding's lookup. `index_T` int64 in [0, N)."""
        if not self.columns:
            return F.embedding(index_T, self.data)
        return self.data[index_T // self.columns, :, index_T % self.columns]

    def part(self, start: int, stop: int) -> tuple["PackedWeight", int]:
        """Whole panels that hold rows [start, stop), without a copy, and where `start` is in them."""
        if not self.columns:
            return PackedWeight(self.data[start:stop], stop - start, self.k, 0), 0
        first, last = start // self.columns, -(-stop // self.columns)
        n = min(self.n, last * self.columns) - first * self.columns
        return PackedWeight(self.data[first:last], n, self.k, self.columns), start - first * self.columns


def pack_weight(weight_NK: torch.Tensor) -> PackedWeight:
    """Pack a weight; fp32 on the CPU natively, everything else is kept as it is."""
    n, k = weight_NK.shape
    if weight_NK.dtype is not torch.float32 or not weight_NK.is_cpu or n == 0 or k == 0:
        return PackedWeight(weight_NK, n, k, 0)
    columns = _native.gemm_columns()
    panels = -(-n // columns)
    packed = torch.empty(panels, k, columns)
    advise_huge_pages(packed)
    whole = n // columns
    packed[:whole] = weight_NK[: whole * columns].view(whole, columns, k).transpose(1, 2)
    if whole < panels:
        packed[whole] = 0
        packed[whole, :, : n - whole * columns] = weight_NK[whole * columns :].T
    return PackedWeight(packed, n, k, columns)


def linear(x_TK: torch.Tensor, weight: PackedWeight, bias_N: torch.Tensor | None = None) -> torch.Tensor:
    """x @ weight^T + bias, [T, N]. Rows of x are contiguous. Raises ValueError.

    A row's result depends neither on the other rows nor on the number of threads.
    """
    if not weight.columns:
        return F.linear(x_TK, weight.data, bias_N)
    if x_TK.dtype is not torch.float32 or not x_TK.is_cpu:
        fail("x_TK", x_TK, "float32 on cpu, as the packed weight")
    if weight.columns != _native.gemm_columns():
        raise ValueError(
            f"the weight was packed for panels of {weight.columns} columns, the instruction set in use has "
            f"{_native.gemm_columns()}; pack it again after set_isa"
        )
    rows = x_TK.shape[0]
    out_TN = torch.empty(rows, weight.n)
    if rows:
        _native.gemm(
            x_TK.data_ptr(), weight.data.data_ptr(), 0 if bias_N is None else dense("bias_N", bias_N, weight.n),
            out_TN.data_ptr(), rows, weight.n, weight.k, row_stride("x_TK", x_TK, rows, weight.k), weight.n,
        )  # fmt: skip
    return out_TN
