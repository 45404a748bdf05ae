"""Scans over rows of logits, for sampling. S sampled rows, V (local) vocabulary, C candidates.

Logits must not be NaN. fp32 on the CPU with contiguous rows runs natively, everything else in `reference`. Results do
not depend on the number of threads, and a row's do not depend on the other rows.
"""

import torch

from evener.kernels import _native, reference
from evener.kernels.checks import dense, fail, native, row_stride


def argmax_rows(logits_SV: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(index int64 [S], value fp32 [S]) of each row's largest logit; the lowest index on ties. V >= 1."""
    if not native(logits_SV):
        return reference.argmax_rows(logits_SV)
    rows, width = logits_SV.shape
    stride = _logits_stride(logits_SV, 1)
    index_S, value_S = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _native.argmax(logits_SV.data_ptr(), rows, width, stride, index_S.data_ptr(), value_S.data_ptr())
    return index_S, value_S


def gumbel_argmax(
    logits_SV: torch.Tensor,
    inv_temperature_S: torch.Tensor,
    key_S: torch.Tensor,
    vocab_offset: int,
    floor_S: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """An exact sample of softmax(logits / temperature) among logits >= floor, as (index int64 [S], score fp32 [S]).

    The argmax over v of logits[v] * inv_temperature + gumbel_noise(key, vocab_offset + v); the index is local (without
    `vocab_offset`), the lowest on ties. Where no logit reaches the floor the score is -inf and the index 0. Over a
    split vocabulary the highest score of all ranks wins. `inv_temperature_S` (finite) and `floor_S` fp32 [S]; `key_S`
    int64 or uint64 [S]. Raises ValueError.
    """
    if not native(logits_SV, inv_temperature_S, floor_S):
        return reference.gumbel_argmax(logits_SV, inv_temperature_S, key_S, vocab_offset, floor_S)
    rows, width = logits_SV.shape
    stride = _logits_stride(logits_SV, 1)
    index_S, value_S = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _native.gumbel_argmax(
        logits_SV.data_ptr(), rows, width, stride, dense("inv_temperature_S", inv_temperature_S, rows),
        _keys(key_S, rows), vocab_offset, dense("floor_S", floor_S, rows), index_S.data_ptr(), value_S.data_ptr(),
    )  # fmt: skip
    return index_S, value_S


def choose_rows(
    logits_SV: torch.Tensor,
    inv_temperature_S: torch.Tensor,
    key_S: torch.Tensor,
    greedy_S: torch.Tensor,
    vocab_offset: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`argmax_rows` of the greedy rows and `gumbel_argmax` without a floor of the others, in one call.

    (index int64 [S], local; score fp32 [S]: a greedy row's logit). `greedy_S` bool [S]; V >= 1. Raises ValueError.
    """
    if not native(logits_SV, inv_temperature_S):
        return reference.choose_rows(logits_SV, inv_temperature_S, key_S, greedy_S, vocab_offset)
    rows, width = logits_SV.shape
    stride = _logits_stride(logits_SV, 1)
    if greedy_S.dtype is not torch.bool or not greedy_S.is_cpu:
        fail("greedy_S", greedy_S, f"bool ({rows},) on cpu")
    index_S, value_S = torch.empty(rows, dtype=torch.int64), torch.empty(rows)
    _native.choose(
        logits_SV.data_ptr(), rows, width, stride, dense("inv_temperature_S", inv_temperature_S, rows),
        _keys(key_S, rows), dense("greedy_S", greedy_S, rows), vocab_offset, index_S.data_ptr(), value_S.data_ptr(),
    )  # fmt: skip
    return index_S, value_S


def gumbel_noise(key_S: torch.Tensor, index_SC: torch.Tensor) -> torch.Tensor:
    """fp32 [S, C]: the very noise that `gumbel_argmax` adds to the logits of (global) vocabulary indices `index_SC`.

    `key_S` int64 or uint64 [S], `index_SC` int64 [S, C] in [0, 2**32). Raises ValueError.
    """
    if not index_SC.is_cpu:
        return reference.gumbel_noise(key_S, index_SC)
    rows, width = index_SC.shape
    if index_SC.dtype is not torch.int64:
        fail("index_SC", index_SC, "int64")
    index_SC = index_SC.contiguous()
    noise_SC = torch.empty(rows, width)
    _native.gumbel_noise(_keys(key_S, rows), index_SC.data_ptr(), rows, width, noise_SC.data_ptr())
    return noise_SC


def logsumexp_rows(logits_SV: torch.Tensor) -> torch.Tensor:
    """log(sum(exp(logits))), fp32 [S]; -inf for a row of -inf or without columns."""
    if not native(logits_SV):
        return reference.logsumexp_rows(logits_SV)
    rows, width = logits_SV.shape
    if width == 0:
        return torch.full((rows,), -torch.inf)
    out_S = torch.empty(rows)
    _native.logsumexp(logits_SV.data_ptr(), rows, width, _logits_stride(logits_SV, 1), out_S.data_ptr())
    return out_S


def top_candidates(logits_SV: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(values fp32 [S, k] descending, indices int64 [S, k]); of equals the lowest index first. 1 <= k <= V.

    One pass with a heap of k: made for k much smaller than V. Raises ValueError.
    """
    if k < 1 or k > logits_SV.shape[1]:
        raise ValueError(f"k = {k} candidates of {logits_SV.shape[1]} logits; it must be in 1..{logits_SV.shape[1]}")
    if not native(logits_SV):
        return reference.top_candidates(logits_SV, k)
    rows, width = logits_SV.shape
    value_SK, index_SK = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int64)
    stride = _logits_stride(logits_SV, 1)
    _native.top_candidates(logits_SV.data_ptr(), rows, width, stride, k, value_SK.data_ptr(), index_SK.data_ptr())
    return value_SK, index_SK


def _logits_stride(logits_SV: torch.Tensor, least: int) -> int:
    rows, width = logits_SV.shape
    if width < least:
        fail("logits_SV", logits_SV, f"[S, V] with V >= {least}")
    return row_stride("logits_SV", logits_SV, rows, width)


def _keys(key_S: torch.Tensor, rows: int) -> int:
    if key_S.dtype not in (torch.int64, torch.uint64) or not key_S.is_cpu:
        fail("key_S", key_S, f"int64 or uint64 ({rows},) on cpu")
    return dense("key_S", key_S, rows)
