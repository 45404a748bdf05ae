"""What one rank computes on its own interval of the vocabulary, as tensors ready to be exchanged."""

import numpy as np
import torch

from evener.execute.live.sampling.slots import I64, RowParams
from evener.kernels import argmax_rows, gumbel_argmax, gumbel_noise, logsumexp_rows, top_candidates


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
        index = torch.zeros(len(at), dtype=torch.int32, device=self.device)
        if not self.logits_SV.shape[1]:
            return [score, index, logit]
        if floor is None:
            floor = score.clone()
        greedy = self.rows.greedy[at]
        for some in (np.flatnonzero(greedy), np.flatnonzero(~greedy)):
            if not len(some):
                continue
            logits = pick(self.logits_SV, at[some])
            to = torch.from_numpy(some).to(self.device)
            if greedy[some[0]]:
                best, value = argmax_rows(logits)
            else:
                inverse, key = self._inverse(at[some]), self._key(at[some])
                best, value = gumbel_argmax(logits, inverse, key, self.offset, floor[to])
            score[to] = value
            logit[to] = logits.gather(1, best.unsqueeze(1)).squeeze(1)
            index[to] = (best + self.offset).to(torch.int32)
        return [score, index, logit]

    def candidates(self, at: I64, width: int) -> list[torch.Tensor]:
        """[logit, index, score, mass] of rows `at`: the `width` largest logits, descending, and what belongs to them.

        The first three are [F, width], see `padded_candidates`. `mass` [F] is the logarithm of the local sum of
        exp((logit - largest local logit) / temperature), for rows that need it (top_p over the whole vocabulary).
        """
        logits = pick(self.logits_SV, at)
        inverse = self._inverse(at)
        value, index = padded_candidates(logits, width, self.offset)
        score = value * inverse.unsqueeze(1) + gumbel_noise(self._key(at), index)
        mass = torch.full((len(at),), -torch.inf, device=self.device)
        need = np.flatnonzero((self.rows.top_p[at] < 1) & (self.rows.top_k[at] == 0) & (self.rows.min_p[at] == 0))
        if len(need) and logits.shape[1]:
            to = torch.from_numpy(need).to(self.device)
            # Shifted before it is scaled: a low temperature would otherwise cost all precision.
            shifted = pick(logits, need) - value[to, :1]
            mass[to] = logsumexp_rows(shifted.mul_(inverse[to].unsqueeze(1)))
        return [value, index.to(torch.int32), score, mass]

    def mass(self, at: I64, largest: np.ndarray, cut: np.ndarray, strict: bool) -> torch.Tensor:
        """fp64 [F]: the sum of exp((logit - largest) / temperature) over logits above the cut (or at it)."""
        logits = pick(self.logits_SV, at)
        bound = torch.from_numpy(cut).to(self.device).unsqueeze(1)
        weight = logits - torch.from_numpy(largest).to(self.device).unsqueeze(1)
        weight = weight.mul_(self._inverse(at).unsqueeze(1)).exp_()
        return weight.mul_(logits > bound if strict else logits >= bound).sum(dim=1).double()

    def _inverse(self, at: I64) -> torch.Tensor:
        return torch.from_numpy((1.0 / self.rows.temperature[at]).astype(np.float32)).to(self.device)

    def _key(self, at: I64) -> torch.Tensor:
        """The 64 key bits as int64."""
        return torch.from_numpy(self.rows.key[at].view(np.int64)).to(self.device)


def pick(rows_S: torch.Tensor, at: I64) -> torch.Tensor:
    """Rows `at` (ascending, at least one); a view where they are contiguous, as copying costs as much as using."""
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
