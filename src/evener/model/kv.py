"""The KV cache of one shard: tensors only; who owns which block is the engine's business."""

import numpy as np
import torch

from evener import kernels
from evener.errors import InvalidInput
from evener.spec.memory import BLOCK_TOKENS


class KVSlabs:
    """Slabs per (layer, KV head), so that layers and heads can move between devices.

    `k` [layers, kv_heads, blocks, head_dim, BLOCK_TOKENS]: transposed inside the block, so that a query reads
    BLOCK_TOKENS keys side by side. `v` [layers, kv_heads, blocks, BLOCK_TOKENS, head_dim]. Both zeroed: what was never
    written is finite. A shard without heads has empty slabs. In int8 a block is one run of BLOCK_TOKENS * (head_dim +
    4) bytes, those values and then an fp32 scale per token, so that it is still copied as a whole.
    """

    def __init__(
        self,
        layers: int,
        kv_heads: int,
        blocks: int,
        head_dim: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if blocks < 1:
            raise InvalidInput(f"a KV cache of {blocks} blocks holds no token; give it at least 1")
        if dtype not in _NUMPY:
            raise InvalidInput(f"a KV cache of {dtype} is not supported; supported: {', '.join(map(str, _NUMPY))}")
        k_block: tuple[int, ...] = (head_dim, BLOCK_TOKENS)
        v_block: tuple[int, ...] = (BLOCK_TOKENS, head_dim)
        if dtype is torch.int8:
            k_block = v_block = (BLOCK_TOKENS * (head_dim + 4),)
        self.k = _zeros((layers, kv_heads, blocks, *k_block), device, dtype)
        self.v = _zeros((layers, kv_heads, blocks, *v_block), device, dtype)

    @property
    def nbytes(self) -> int:
        """Bytes of both slabs."""
        return self.k.nbytes + self.v.nbytes


_NUMPY = {torch.float32: np.float32, torch.bfloat16: np.uint16, torch.int8: np.int8}


def _zeros(shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype) -> torch.Tensor:
    """Zeros. On the CPU the kernel's own zero pages: memory is taken as blocks are first written."""
    if torch.device(device).type == "cpu":
        slab = torch.from_numpy(np.zeros(shape, dtype=_NUMPY[dtype])).view(dtype)
        kernels.advise_huge_pages(slab)
        return slab
    return torch.zeros(shape, device=device, dtype=dtype)
