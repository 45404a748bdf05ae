"""Mixed batches over a paged KV cache, made from a seed."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from evener import kernels
from evener.kernels import reference

BLOCK = 16


@dataclass
class Paged:
    """One batch: arguments of `paged_attention`. Keys and values of positions that no sequence has are NaN."""

    q_TQD: torch.Tensor
    k_slab: torch.Tensor
    v_slab: torch.Tensor
    cu_R: torch.Tensor
    start_R: torch.Tensor
    tables_RM: torch.Tensor
    kv_of_head: torch.Tensor
    scale: float

    def narrowed(self, dtype: torch.dtype) -> "Paged":
        """The same with K and V of another dtype."""
        if dtype is not torch.int8:
            return replace(self, k_slab=self.k_slab.to(dtype), v_slab=self.v_slab.to(dtype))
        # Per token: K [n_kv, blocks, D, 16], V [n_kv, blocks, 16, D]. NaN has no integer: it becomes the scale.
        k, k_scale = reference.quantize(self.k_slab.nan_to_num().transpose(-1, -2))
        v, v_scale = reference.quantize(self.v_slab.nan_to_num())
        k_scale[self.k_slab.isnan().any(-2)] = v_scale[self.v_slab.isnan().any(-1)] = torch.nan

        def slab(values: torch.Tensor, places: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
            placed = torch.empty_like(values.flatten(-2))
            placed[..., places] = values
            return torch.cat([placed, scale.contiguous().view(torch.int8)], dim=-1).contiguous()

        dim = self.q_TQD.shape[-1]
        return replace(
            self,
            k_slab=slab(k.transpose(-1, -2), reference.key_places(dim), k_scale),
            v_slab=slab(v, reference.value_places(dim), v_scale),
        )

    def run(self) -> torch.Tensor:
        """The native result; padding stays -7."""
        out_TQD = torch.full_like(self.q_TQD, -7.0)
        kernels.paged_attention(*vars(self).values(), out_TQD)
        return out_TQD

    def reference(self) -> torch.Tensor:
        """The same by the reference, in fp64."""
        out_TQD = torch.full_like(self.q_TQD, -7.0).double()
        values = [
            v.double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in vars(self).values()
        ]
        reference.paged_attention(*values, out_TQD)
        return out_TQD.float()


def paged(
    chunks: Sequence[tuple[int, int]], kv_of_head: Sequence[int], dim: int, padding: int = 0, seed: int = 0
) -> Paged:
    """A batch of (start, count) chunks, each of a sequence of its own, with blocks in random order."""
    g = torch.Generator().manual_seed(seed)
    n_blocks = [-(-(start + count) // BLOCK) for start, count in chunks]
    total, kv_heads = sum(n_blocks) + 2, max(kv_of_head) + 1
    order = torch.randperm(total, generator=g, dtype=torch.int64)
    k_slab = torch.full((kv_heads, total, dim, BLOCK), torch.nan)
    v_slab = torch.full((kv_heads, total, BLOCK, dim), torch.nan)
    tables_RM = torch.zeros(len(chunks), max(n_blocks), dtype=torch.int32)
    for r, (start, count) in enumerate(chunks):
        own = order[sum(n_blocks[:r]) :][: n_blocks[r]]
        tables_RM[r, : n_blocks[r]] = own
        position = torch.arange(start + count)
        block, offset = own[position // BLOCK], position % BLOCK
        # An index on both sides of a slice puts the indexed dimension first.
        k_slab[:, block, :, offset] = torch.randn(start + count, kv_heads, dim, generator=g)
        v_slab[:, block, offset] = torch.randn(kv_heads, start + count, dim, generator=g)
    counts = torch.tensor([0] + [count for _, count in chunks])
    rows = int(counts.sum()) + padding
    return Paged(
        torch.randn(rows, len(kv_of_head), dim, generator=g) * 2,
        k_slab,
        v_slab,
        counts.cumsum(0).to(torch.int32),
        torch.tensor([start for start, _ in chunks], dtype=torch.int32),
        tables_RM,
        torch.tensor(kv_of_head, dtype=torch.int32),
        dim**-0.5,
    )
