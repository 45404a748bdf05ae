"""From local logits to tokens, identical on every rank, over any split of the vocabulary.

A token is chosen as the argmax of `logit / temperature + Gumbel noise` (Gumbel 1954; Maddison et al.,
arXiv:1411.0030), where the noise is a pure function of (seed, choice, position, vocabulary index). The choice is
therefore an exact sample of the softmax that depends neither on how the vocabulary is split nor on what else is in
the batch, and ranks exchange one (score, index) pair per row instead of probabilities.

Order as in vLLM: penalties on logits, temperature, then min_p, top_k, top_p, then the choice. Rows with one of these
three send their best `NARROW` candidates and their local mass in the same message, from which the cut is mostly
proven (`sampling.nucleus`). Where it is not (a flat distribution under top_p), the winner over the whole vocabulary is
found and tested: if it is inside the kept set it is the winner of the kept set too, as the noise of the others does
not matter. Otherwise the search goes on strictly above it. That is exact, a round costs a few bytes per row, a second
round is as rare as 1 - top_p, and no row of logits is ever sent.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from evener.engine.batch import TokenLogprobs
from evener.engine.request import SamplingParams
from evener.errors import EvenerError
from evener.execute.live.sampling import nucleus
from evener.execute.live.sampling.exchange import Exchange
from evener.execute.live.sampling.local import LocalLogits, pick, plain_winners
from evener.execute.live.sampling.logprobs import token_logprobs
from evener.execute.live.sampling.penalties import SeenTokens, apply_penalties, has_penalties
from evener.execute.live.sampling.slots import I64, PlainRows, RowParams, SlotTable
from evener.execute.live.transport.base import Group

NARROW = 64
"""Candidates per rank and row, unless a top_k needs more."""


class Sampled(NamedTuple):
    """What `Sampler.sample` returns."""

    tokens: torch.Tensor
    """int64 [S] on the sampler's device."""
    logprobs: dict[int, TokenLogprobs]
    """Row -> entry, for rows that asked; filled on rank 0, empty elsewhere."""


class Sampler:
    """Chooses tokens on the ranks of a last stage. Every rank makes the same calls in the same order.

    A rank owns the logits of the vocabulary interval [a, b), which may be empty. `group` is None for a single rank.
    """

    def __init__(
        self,
        group: Group | None,
        rank: int,
        vocab_interval: tuple[int, int],
        vocab_size: int,
        device: torch.device | str = "cpu",
    ) -> None:
        self._exchange = Exchange(group)
        self._rank = rank
        self._interval = vocab_interval
        self._vocab = vocab_size
        self._device = torch.device(device)
        self._slots = SlotTable()
        self._seen: dict[int, SeenTokens] = {}

    def add(self, slot: int, tokens: Sequence[int], prompt_len: int, params: SamplingParams) -> None:
        """A sequence takes a slot. `tokens` are its known tokens, the first `prompt_len` of them the prompt."""
        self._slots.add(slot, params)
        self._seen.pop(slot, None)
        if has_penalties(params):
            self._seen[slot] = SeenTokens(tokens, prompt_len, params, self._interval)

    def drop(self, slot: int) -> None:
        """The slot is free for reuse."""
        self._slots.drop(slot)
        self._seen.pop(slot, None)

    def note(self, slots: Sequence[int], tokens: Sequence[int]) -> None:
        """An output token of each slot became known; call it before the slots sample again."""
        if not self._seen:
            return
        for slot, token in zip(slots, tokens, strict=True):
            seen = self._seen.get(slot)
            if seen is not None:
                seen.note(token)

    def sample(self, logits_SV: torch.Tensor, slots: Sequence[int], positions: Sequence[int]) -> Sampled:
        """Choose one token per row; `positions[s]` is the position the new token will have in its sequence.

        `logits_SV` is fp32 [S, b - a], contiguous; rows with penalties are changed in place. One all_gather; one
        more if a row wants logprobs; more in the rare cases named at the top. Raises WorkerLost, and EvenerError
        when a row has no finite logit.
        """
        if not slots:
            return Sampled(torch.zeros(0, dtype=torch.int64, device=self._device), {})
        if self._seen.keys().isdisjoint(slots):
            plain = self._slots.plain(slots, positions)
            if plain is not None:  # what nearly every row is: nothing but the one call and the one message
                return Sampled(torch.from_numpy(self._choose_plain(logits_SV, plain)).to(self._device), {})
        rows = self._slots.rows(slots, positions)
        asked = np.flatnonzero(rows.logprobs >= 0)
        penalised = [(s, self._seen[slot]) for s, slot in enumerate(slots) if slot in self._seen]
        raw_SV = pick(logits_SV, asked) if len(asked) else logits_SV[:0]
        if len(asked) and penalised and raw_SV.untyped_storage().data_ptr() == logits_SV.untyped_storage().data_ptr():
            raw_SV = raw_SV.clone()  # logprobs are those of the distribution before penalties
        apply_penalties(logits_SV, penalised)
        tokens_S = self._choose(LocalLogits(logits_SV, rows, self._interval[0]))
        logprobs: dict[int, TokenLogprobs] = {}
        if len(asked):
            entries = self.prompt_logprobs(raw_SV, tokens_S[asked].tolist(), int(rows.logprobs.max()))
            if self._rank == 0:
                for s, e in zip(asked.tolist(), entries, strict=True):
                    logprobs[s] = TokenLogprobs(e.token, e.logprob, e.rank, e.top[: int(rows.logprobs[s])])
        return Sampled(torch.from_numpy(tokens_S).to(self._device), logprobs)

    def prompt_logprobs(self, logits_PV: torch.Tensor, next_tokens: Sequence[int], top: int) -> list[TokenLogprobs]:
        """Log-probabilities of given tokens: entry p is `next_tokens[p]` under `logits_PV[p]` (fp32 [P, b - a]).

        Each with its rank and the `top` most likely tokens. One all_gather, or two. Raises WorkerLost.
        """
        if not next_tokens:
            return []
        return token_logprobs(self._exchange, logits_PV, next_tokens, top, self._interval[0], self._vocab)

    def _choose_plain(self, logits_SV: torch.Tensor, rows: PlainRows) -> I64:
        """The best token of each row over the whole vocabulary: the highest score, the lowest index on ties."""
        parts = plain_winners(logits_SV, rows, self._interval[0])
        score_RS, index_RS = self._exchange.gather(parts)
        score_S, index_S = score_RS[0], index_RS[0]
        if self._exchange.size > 1:
            rank = _leader(score_RS, index_RS)
            score_S, index_S = (np.take_along_axis(x, rank, axis=0)[0] for x in (score_RS, index_RS))
        if not np.isfinite(score_S).all():
            _check_finite(score_S, np.arange(len(score_S)))
        tokens_S: I64 = index_S.astype(np.int64)
        return tokens_S

    def _choose(self, local: LocalLogits) -> I64:
        """One message for all rows, then the rows whose cut it did not prove."""
        rows = local.rows
        filtered = ~rows.greedy & ((rows.top_k > 0) | (rows.top_p < 1) | (rows.min_p > 0))
        direct = np.flatnonzero(~filtered)
        groups = self._widths(np.flatnonzero(filtered), rows)
        parts = local.winners(direct)
        for at, width in groups:
            parts += local.candidates(at, width)
        got = iter(self._exchange.gather(parts))

        tokens_S = np.full(len(rows.key), -1, np.int64)
        if len(direct):
            score, tokens_S[direct], _ = _best(next(got), next(got), next(got))
            _check_finite(score, direct)
        for at, _ in groups:
            logit_RFC, index_RFC, score_RFC, log_mass_RF = next(got), next(got), next(got), next(got)
            found = nucleus.merge(logit_RFC, index_RFC, score_RFC)
            largest = found.logit_FM[:, 0]
            _check_finite(largest, at)
            gap_RF = logit_RFC[:, :, 0].astype(np.float64) - largest
            mass_F = np.exp(log_mass_RF + gap_RF / rows.temperature[at]).sum(axis=0)
            cuts = nucleus.cuts(found, rows.temperature[at], rows.top_k[at], rows.top_p[at], rows.min_p[at], mass_F)
            tokens_S[at] = nucleus.choose(found, cuts.cut_F)
            left = np.flatnonzero(~cuts.resolved_F)
            if len(left):
                tokens_S[at[left]] = self._search(local, at[left], cuts.take(left))
        return tokens_S

    def _search(self, local: LocalLogits, at: I64, cuts: nucleus.Cuts) -> I64:
        """Take the winner at or above a lower bound of the cut; if it is outside the nucleus, go strictly above it."""
        top_p, lower, mass = local.rows.top_p[at], cuts.cut_F, cuts.mass_F
        # The listed tokens hold less than top_p of a known mass (or they would prove the cut): those among them that
        # are above the floor are kept. Without top_p the bound is the cut.
        kept_from = np.where(top_p >= 1, lower, np.where(np.isnan(mass), np.inf, cuts.floor_F))
        if np.isnan(mass[top_p < 1]).any():
            (total_RF,) = self._exchange.gather([local.mass(at, cuts.largest_F, lower, strict=False)])
            mass = np.where(np.isnan(mass), total_RF.sum(axis=0), mass)
        tokens = np.full(len(at), -1, np.int64)
        left = np.arange(len(at))
        while len(left):
            floor = torch.from_numpy(lower[left]).to(self._device)
            score, tokens[left], logit = _best(*self._exchange.gather(local.winners(at[left], floor)))
            _check_finite(score, at[left])
            open_ = logit < kept_from[left]
            left, logit = left[open_], logit[open_]
            if len(left):
                (above_RF,) = self._exchange.gather([local.mass(at[left], cuts.largest_F[left], logit, strict=True)])
                outside = (above_RF.sum(axis=0) >= top_p[left] * mass[left]) & (logit < cuts.largest_F[left])
                left, logit = left[outside], logit[outside]
                lower[left] = np.nextafter(logit, np.float32(np.inf))
        return tokens

    def _widths(self, filtered: I64, rows: RowParams) -> list[tuple[I64, int]]:
        """Filtered rows by the number of candidates they exchange: one more than top_k, so that a floor lies below."""
        wide = rows.top_k[filtered] >= NARROW
        widest = int(rows.top_k[filtered].max(initial=0)) + 1
        groups = ((filtered[~wide], NARROW), (filtered[wide], widest))
        return [(at, min(width, self._vocab + 1)) for at, width in groups if len(at)]


def _best(score_RW: nucleus.F32, index_RW: nucleus.I32, logit_RW: nucleus.F32) -> tuple[nucleus.F32, I64, nucleus.F32]:
    """(score, index, logit) of the best rank: the highest score, the lowest index on ties."""
    rank = _leader(score_RW, index_RW)
    score, index, logit = (np.take_along_axis(x, rank, axis=0)[0] for x in (score_RW, index_RW, logit_RW))
    return score, index.astype(np.int64), logit


def _leader(score_RW: nucleus.F32, index_RW: nucleus.I32) -> I64:
    """[1, W]: which rank is the best."""
    tied = np.where(score_RW == score_RW.max(axis=0), index_RW, np.iinfo(np.int32).max)
    leader: I64 = tied.argmin(axis=0)[None]
    return leader


def _check_finite(best: nucleus.F32, rows: I64) -> None:
    if not np.isfinite(best).all():
        raise EvenerError(
            f"sampled rows {rows[~np.isfinite(best)].tolist()} have no finite logit; the weights hold NaN or the "
            "dtype overflows: serve the model in fp32, or check its weights"
        )
