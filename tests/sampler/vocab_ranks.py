"""Ranks as threads of one process, and the sampler's plain full-vocabulary reference."""

import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from evener.engine.request import SamplingParams
from evener.execute.live.sampling.slots import mix
from evener.execute.live.transport.base import Stamp
from evener.kernels.reference import gumbel_noise
from evener.units import Nanoseconds

MASK = (1 << 64) - 1
STAMP = Stamp(Nanoseconds(0), Nanoseconds(0), Nanoseconds(0))

SPLITS = ([300], [150, 150], [37, 263], [0, 300], [100, 0, 200], [65, 64, 63, 108])
"""Sizes of the ranks' intervals of a vocabulary of 300."""


def intervals(sizes: list[int]) -> list[tuple[int, int]]:
    ends = np.cumsum([0, *sizes]).tolist()
    return list(pairwise(ends))


def logits(seed: int, rows: int, vocab: int, scale: float, ties: bool = False) -> torch.Tensor:
    x = torch.randn(rows, vocab, generator=torch.Generator().manual_seed(seed)) * scale
    return (x * 2).round() / 2 if ties else x


class ThreadGroup:
    """One rank of a group of threads; counts the messages."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(shared)
        self._shared, self._barrier = shared, barrier
        self.gathers = 0

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        self.gathers += 1
        self._shared[self.rank] = t
        self._barrier.wait(timeout=20)
        assert len({x.shape for x in self._shared}) == 1, "ranks must send messages of one size"
        out.copy_(torch.stack(self._shared))
        self._barrier.wait(timeout=20)
        return STAMP

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        raise NotImplementedError

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        raise NotImplementedError

    def close(self) -> None:
        pass


def on_ranks(
    intervals: Sequence[tuple[int, int]], job: Callable[[ThreadGroup | None, int, tuple[int, int]], Any]
) -> list[Any]:
    """Run `job(group, rank, interval)` on one thread per interval; one interval runs without a group."""
    if len(intervals) == 1:
        return [job(None, 0, intervals[0])]
    barrier, shared = threading.Barrier(len(intervals)), [None] * len(intervals)

    def rank(r: int) -> Any:
        try:
            return job(ThreadGroup(r, shared, barrier), r, intervals[r])
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(intervals)) as pool:
        return list(pool.map(rank, range(len(intervals))))


def row_key(params: SamplingParams, position: int) -> int:
    """The documented mix of (seed, choice, position), written out with Python integers."""
    return mix((mix((mix(params.seed) + params.choice) & MASK) + position) & MASK)


def noise(params: SamplingParams, position: int, vocab: int) -> torch.Tensor:
    """The Gumbel noise of every token, fp32 [vocab]."""
    key = row_key(params, position)
    key_1 = torch.tensor([key - (1 << 64) if key >> 63 else key], dtype=torch.int64)
    return gumbel_noise(key_1, torch.arange(vocab)[None])[0]


def penalised(logits_V: torch.Tensor, tokens: Sequence[int], prompt_len: int, p: SamplingParams) -> torch.Tensor:
    """Penalties, one token at a time."""
    out = logits_V.clone()
    for t in set(tokens):
        count = list(tokens[prompt_len:]).count(t)
        x = float(out[t])
        x = x / p.repetition_penalty if x > 0 else x * p.repetition_penalty
        out[t] = x - p.frequency_penalty * count - p.presence_penalty * (count > 0)
    return out


def kept_set(logits_V: torch.Tensor, p: SamplingParams) -> torch.Tensor:
    """bool [vocab]: what min_p, top_k and top_p keep, from the whole vocabulary in fp64."""
    x = logits_V.double() / p.temperature
    if p.min_p > 0:
        prob = torch.softmax(x, 0)
        x = x.masked_fill(prob < p.min_p * prob.max(), -torch.inf)
    if 0 < p.top_k < len(x):
        x = x.masked_fill(x < torch.sort(x, descending=True).values[p.top_k - 1], -torch.inf)
    if p.top_p < 1:
        prob = torch.softmax(x, 0)
        above = (prob * (x > x.unsqueeze(1))).sum(dim=1)
        x = x.masked_fill(above >= p.top_p, -torch.inf)
    return x > -torch.inf


def choose(logits_V: torch.Tensor, p: SamplingParams, position: int) -> int:
    """The reference choice for one row of penalised logits."""
    if p.greedy:
        return int(logits_V.argmax())
    score = logits_V * (1 / p.temperature) + noise(p, position, len(logits_V))
    return int(score.masked_fill(~kept_set(logits_V, p), -torch.inf).argmax())
