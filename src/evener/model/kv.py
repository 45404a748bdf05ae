"""The KV cache of one shard: tensors only; who owns which block is the engine's business."""

import numpy as np
import torch

from evener import kernels
from evener.errors import InvalidInput
from evener.spec.memory import BLOCK_TOKENS


class KVSlabs:
    """Slabs per (layer, KV head), so that layers and heads can move between devices.

    `k` [layers, kv_heads, blocks, head_dim, BLOCK_TOKENS]: transposed inside the block, so that a query reads
    BLOCK_TOKENS keys side by side. `v` [layers, kv_heads, blocks, BLOCK_TOKENS, head_dim]. Both fp32, zeroed: what
    was never written is finite. A shard without heads has empty slabs.
    """

    def __init__(
        self, layers: int, kv_heads: int, blocks: int, head_dim: int, device: torch.device | str = "cpu"
    ) -> None:
        if blocks < 1:
            raise InvalidInput(f"a KV cache of {blocks} blocks holds no token; give it at least 1")
        self.k = _zeros((layers, kv_heads, blocks, head_dim, BLOCK_TOKENS), device)
        self.v = _zeros((layers, kv_heads, blocks, BLOCK_TOKENS, head_dim), device)

    @property
    def nbytes(self) -> int:
        """Bytes of both slabs."""
        return self.k.nbytes + self.v.nbytes


def _zeros(shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """fp32 zeros. On the CPU the kernel's own zero pages: memory is taken as blocks are first written."""
    if torch.device(device).type == "cpu":
        slab = torch.from_numpy(np.zeros(shape, dtype=np.float32))
        kernels.advise_huge_pages(slab)
        return slab
    return torch.zeros(shape, device=device)
