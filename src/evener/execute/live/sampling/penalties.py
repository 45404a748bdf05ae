"""Repetition, frequency and presence penalties on the tokens that a sequence has seen.

Cost is O(distinct tokens seen), not O(vocabulary): a sequence keeps its distinct tokens and their counts, and one
gather and one scatter serve all rows of a batch.
"""

from collections.abc import Sequence

import numpy as np
import torch

from evener.engine.request import SamplingParams


def has_penalties(params: SamplingParams) -> bool:
    """Whether any penalty differs from its neutral value."""
    return bool(params.repetition_penalty != 1.0 or params.presence_penalty or params.frequency_penalty)


class SeenTokens:
    """The distinct tokens of one sequence inside the vocabulary interval [a, b), and how often each was output."""

    def __init__(
        self, tokens: Sequence[int], prompt_len: int, params: SamplingParams, vocab_interval: tuple[int, int]
    ) -> None:
        a, b = vocab_interval
        self.params = params
        self._a, self._b = a, b
        known = np.asarray(tokens, np.int64)
        inside = (known >= a) & (known < b)
        distinct, first = np.unique(known[inside] - a, return_inverse=True)
        output = (np.arange(len(known)) >= prompt_len)[inside]
        self._n = len(distinct)
        self._ids = np.zeros(max(16, 2 * self._n), np.int64)
        self._ids[: self._n] = distinct
        self._counts = np.zeros(len(self._ids), np.float32)
        self._counts[: self._n] = np.bincount(first, weights=output, minlength=self._n)
        self._place = {int(t): k for k, t in enumerate(distinct)}

    def note(self, token: int) -> None:
        """One more output token."""
        if not self._a <= token < self._b:
            return
        place = self._place.get(token - self._a)
        if place is None:
            place = self._place[token - self._a] = self._n
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token - self._a
            self._n += 1
        self._counts[place] += 1

    def view(self) -> tuple[np.ndarray, np.ndarray]:
        """(local token ids int64 [n], output counts fp32 [n])."""
        return self._ids[: self._n], self._counts[: self._n]


def apply_penalties(logits_SV: torch.Tensor, rows: Sequence[tuple[int, SeenTokens]]) -> None:
    """Change `logits_SV` (contiguous, fp32) in place for these rows; meanings and order as in vLLM.

    Repetition (prompt and output tokens): a positive logit is divided by the penalty, another multiplied
    (Keskar et al., arXiv:1909.05858, section 4.1). Then `frequency * count` and, for tokens with a count,
    `presence` are subtracted (output tokens only).
    """
    if not rows or not logits_SV.shape[1]:
        return
    views = [seen.view() for _, seen in rows]
    sizes = [len(ids) for ids, _ in views]
    at = np.concatenate([ids + row * logits_SV.shape[1] for (row, _), (ids, _) in zip(rows, views, strict=True)])
    count = np.concatenate([c for _, c in views])
    repetition, frequency, presence = (
        np.repeat(np.asarray(values, np.float32), sizes)
        for values in (
            [s.params.repetition_penalty for _, s in rows],
            [s.params.frequency_penalty for _, s in rows],
            [s.params.presence_penalty for _, s in rows],
        )
    )
    at_N = torch.from_numpy(at).to(logits_SV.device)
    rep_N = torch.from_numpy(repetition).to(logits_SV.device)
    less_N = torch.from_numpy(frequency * count + presence * (count > 0)).to(logits_SV.device)
    flat = logits_SV.view(-1)
    old_N = flat[at_N]
    flat[at_N] = torch.where(old_N > 0, old_N / rep_N, old_N * rep_N) - less_N
