"""The rows of one batch as tensors: what every stage needs to run its layers.

Shape suffixes: T rows (tokens) of the batch, R sequences in it, S sampled rows, M the longest block table.
"""

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """One batch, flattened: the tokens of sequence r are rows cu_R[r] .. cu_R[r + 1].

    Padding rows (static policy) come last, beyond cu_R[-1]: they go through the GEMMs and are thrown away.
    """

    positions_T: torch.Tensor
    """int32 [T], position of each row in its sequence; 0 for padding rows."""
    cu_R: torch.Tensor
    """int32 [R + 1], first row of each sequence."""
    start_R: torch.Tensor
    """int32 [R], position of each sequence's first row: the keys already in the cache."""
    tables_RM: torch.Tensor
    """int32 [R, M], KV block numbers; unused entries are 0."""
    kv_slot_T: torch.Tensor
    """int32 [T], where each row's K and V go: block * block_tokens + offset; -1 for padding rows."""
    sample_S: torch.Tensor
    """int64 [S], rows whose logits are wanted."""
    n_rows: int
    """T including padding."""
    n_real: int
    """cu_R[-1]."""
