"""What one rank computes on its own interval of the vocabulary, as tensors ready to be exchanged."""

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from evener.execute.live.sampling.slots import I64, PlainRows, RowParams
from evener.kernels import argmax_rows, choose_rows, gumbel_argmax, gumbel_noise, logsumexp_rows, top_candidates

_BLOCK = 8
"""Rows whose temporaries are made at a time, so that they stay in the cache."""


class LocalLogits:
    """The logits fp32 [S, V] of the vocabulary interval [offset, offset + V), V >= 0, after penalties.

    Methods take `at`, ascending row numbers; they return vocabulary indices, not local ones. A rank without
    tokens answers -inf, so every rank sends messages of one size.
    """

    def __init__(self, logits_SV: torch.Tensor, rows: RowParams, offset: int) -> None:
        self.logits_SV = logits_SV
        self.rows = rows
        self.offset = offset
        self.device = logits_SV.device

    def winners(self, at: I64, floor: torch.Tensor | None = None) -> list[torch.Tensor]:
        """[score, index, logit] of the best token of each row, fp32, int32, fp32; [] for no rows.

        The score is the logit of greedy rows, else logit / temperature + noise. Only tokens with logit >= floor
        (fp32, one per row) count; where there is none the score is -inf.
        """
        if not len(at):
            return []
        score = torch.full((len(at),), -torch.inf, device=self.device)
        logit = score.clone()
        index = torch.zeros(len(at), dtype=torch.int64, device=self.device)
        if self.logits_SV.shape[1]:
            lowest = score.clone() if floor is None else floor
            inverse, key, greedy = self._inverse(at), self._key(at), self.rows.greedy[at]
            for to in runs(at, self.device, greedy):
                logits = pick(self.logits_SV, at[to])
                if greedy[to][0]:
                    best, score[to] = argmax_rows(logits)
                else:
                    best, score[to] = gumbel_argmax(logits, inverse[to], key[to], self.offset, lowest[to])
                index[to] = best
            logit = self.logits_SV[torch.from_numpy(at).to(self.device), index]
            index += self.offset
        return [score, index.to(torch.int32), logit]

    def candidates(self, at: I64, width: int) -> list[torch.Tensor]:
        """[logit, index, score, mass] of rows `at`: the `width` largest logits, descending, and what belongs to them.

        The first three are [F, width], see `padded_candidates`. `mass` [F] is the logarithm of the local sum of
        exp((logit - largest local logit) / temperature), for rows that need it (top_p over the whole vocabulary).
        """
        value = torch.empty((len(at), width), device=self.device)
        index = torch.empty((len(at), width), dtype=torch.int64, device=self.device)
        mass = torch.full((len(at),), -torch.inf, device=self.device)
        inverse = self._inverse(at)
        whole = (self.rows.top_p[at] < 1) & (self.rows.top_k[at] == 0) & (self.rows.min_p[at] == 0)
        for to in runs(at, self.device, whole, _BLOCK):
            logits = pick(self.logits_SV, at[to])
            value[to], index[to] = padded_candidates(logits, width, self.offset)
            if whole[to][0] and logits.shape[1]:
                # Shifted before it is scaled: a low temperature would otherwise cost all precision.
                mass[to] = logsumexp_rows((logits - value[to, :1]).mul_(inverse[to].unsqueeze(1)))
        score = value * inverse.unsqueeze(1) + gumbel_noise(self._key(at), index)
        return [value, index.to(torch.int32), score, mass]

    def mass(self, at: I64, largest: np.ndarray, cut: np.ndarray, strict: bool) -> torch.Tensor:
        """fp64 [F]: the sum of exp((logit - largest) / temperature) over logits above the cut (or at it)."""
        if self.device.type != "cpu":
            logits = pick(self.logits_SV, at)
            bound = torch.from_numpy(cut).to(self.device).unsqueeze(1)
            gap = (logits - torch.from_numpy(largest).to(self.device).unsqueeze(1)) * self._inverse(at).unsqueeze(1)
            return (gap.double().exp() * (logits > bound if strict else logits >= bound)).sum(dim=1)
        # Few logits are above: finding them is cheaper than an exponential of all.
        out = np.zeros(len(at))
        for f, s in enumerate(at.tolist()):
            row = self.logits_SV[s].numpy()
            above = row[np.flatnonzero(row > cut[f] if strict else row >= cut[f])].astype(np.float64)
            out[f] = np.exp((above - largest[f]) / self.rows.temperature[s]).sum()
        return torch.from_numpy(out)

    def _inverse(self, at: I64) -> torch.Tensor:
        return torch.from_numpy((1.0 / self.rows.temperature[at]).astype(np.float32)).to(self.device)

    def _key(self, at: I64) -> torch.Tensor:
        """The 64 key bits as int64."""
        return torch.from_numpy(self.rows.key[at].view(np.int64)).to(self.device)


def plain_winners(logits_SV: torch.Tensor, rows: PlainRows, offset: int) -> list[torch.Tensor]:
    """[score, index] of the best token of every row, fp32 and int32, as `LocalLogits.winners` gives them."""
    device = logits_SV.device
    if not logits_SV.shape[1]:
        lowest = torch.full((len(rows.key),), -torch.inf, device=device)
        return [lowest, torch.zeros(len(rows.key), dtype=torch.int32, device=device)]
    inverse, greedy = torch.from_numpy(rows.inverse).to(device), torch.from_numpy(rows.greedy).to(device)
    key = torch.from_numpy(rows.key.view(np.int64)).to(device)
    index, score = choose_rows(logits_SV, inverse, key, greedy, offset)
    return [score, (index + offset).to(torch.int32)]


def runs(
    at: I64, device: torch.device, kind: NDArray[np.bool_] | None = None, limit: int | None = None
) -> Iterator[slice]:
    """Cut the positions of `at` into slices of one `kind` each.

    On a CPU the rows of a slice are also contiguous and at most `limit`: a call costs little there, and copying rows
    out of the logits as much as using them. On other devices a call costs more than a copy.
    """
    breaks = np.zeros(max(0, len(at) - 1), np.bool_) if kind is None else kind[1:] != kind[:-1]
    if device.type == "cpu":
        breaks = breaks | (np.diff(at) != 1)
    else:
        limit = None
    edges = [0, *(np.flatnonzero(breaks) + 1).tolist(), len(at)]
    for first, end in pairwise(edges):
        step = limit or max(1, end - first)
        for start in range(first, end, step):
            yield slice(start, min(end, start + step))


def pick(rows_S: torch.Tensor, at: I64) -> torch.Tensor:
    """Rows `at` (ascending, at least one); a view where they are contiguous."""
    first, n = int(at[0]), len(at)
    if int(at[-1]) - first + 1 == n:
        return rows_S[first : first + n]
    return rows_S[torch.from_numpy(at).to(rows_S.device)]


def padded_candidates(logits_SV: torch.Tensor, width: int, offset: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest logits of each row, descending, and their vocabulary indices (int64).

    A row with fewer tokens is padded with -inf, so a finite last value says that more tokens may follow.
    """
    n, local = logits_SV.shape
    value = torch.full((n, width), -torch.inf, device=logits_SV.device)
    index = torch.zeros((n, width), dtype=torch.int64, device=logits_SV.device)
    k = min(width, local)
    if k and n:
        best, at = top_candidates(logits_SV, k)
        value[:, :k] = best
        index[:, :k] = at + offset
    return value, index
