"""Sampling parameters by slot, kept as arrays so that a batch of rows is looked up without a loop.

The random counter is (seed, choice, position). A row's 64-bit key is

    key = mix(mix(mix(seed) + choice) + position)

with `mix` the SplitMix64 finaliser applied to `x + 0x9E3779B97F4A7C15` (Steele, Lea, Flood, "Fast splittable
pseudorandom number generators", OOPSLA 2014), all modulo 2**64. `mix` is a bijection, so the positions of one
choice never share a key, and neither do the choices of one seed at one position.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evener.engine.request import SamplingParams

U64 = NDArray[np.uint64]
F64 = NDArray[np.float64]
I64 = NDArray[np.int64]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def mix(x: int) -> int:
    """SplitMix64 of one 64-bit number."""
    x = (x + _GOLDEN) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def mix_all(x: U64) -> U64:
    """SplitMix64 of an array, element by element."""
    x = x + np.uint64(_GOLDEN)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class RowParams(NamedTuple):
    """The parameters of the rows of one batch, each [S]."""

    temperature: F64
    """1 for greedy rows, which do not use it."""
    greedy: NDArray[np.bool_]
    top_k: I64
    """0: all."""
    top_p: F64
    min_p: F64
    logprobs: I64
    """-1: none."""
    key: U64


class PlainRows(NamedTuple):
    """The parameters of rows that are drawn from the whole vocabulary and report nothing but the token, each [S]."""

    inverse: NDArray[np.float32]
    """Of the temperature; 1 for greedy rows."""
    greedy: NDArray[np.bool_]
    key: U64


class SlotTable:
    """Parameters of every slot in use. Slots are small non-negative integers chosen by the brain."""

    def __init__(self) -> None:
        self._size = 0
        self._known = np.zeros(0, np.bool_)
        self._temperature = np.zeros(0, np.float64)
        self._greedy = np.zeros(0, np.bool_)
        self._top_k = np.zeros(0, np.int64)
        self._top_p = np.zeros(0, np.float64)
        self._min_p = np.zeros(0, np.float64)
        self._logprobs = np.zeros(0, np.int64)
        self._key = np.zeros(0, np.uint64)
        self._plain = np.zeros(0, np.bool_)

    def add(self, slot: int, params: SamplingParams) -> None:
        """Set a slot, whatever it held before."""
        if slot >= self._size:
            self._grow(slot + 1)
        self._known[slot] = True
        self._greedy[slot] = params.greedy
        self._temperature[slot] = 1.0 if params.greedy else params.temperature
        self._top_k[slot] = max(0, params.top_k)
        self._top_p[slot] = params.top_p
        self._min_p[slot] = params.min_p
        self._logprobs[slot] = -1 if params.logprobs is None else params.logprobs
        self._plain[slot] = params.logprobs is None and (
            params.greedy or (params.top_k <= 0 and params.top_p >= 1 and params.min_p <= 0)
        )
        self._key[slot] = mix((mix(params.seed & _MASK) + params.choice) & _MASK)

    def drop(self, slot: int) -> None:
        """Forget a slot."""
        self._known[slot] = False

    def rows(self, slots: Sequence[int], positions: Sequence[int]) -> RowParams:
        """Parameters and keys of these slots; `positions` are those of the tokens about to be chosen."""
        at = np.asarray(slots, np.int64)
        assert bool(self._known[at].all()), f"a slot of {list(slots)} was never added"
        return RowParams(
            self._temperature[at],
            self._greedy[at],
            self._top_k[at],
            self._top_p[at],
            self._min_p[at],
            self._logprobs[at],
            mix_all(self._key[at] + np.asarray(positions, np.uint64)),
        )

    def plain(self, slots: Sequence[int], positions: Sequence[int]) -> PlainRows | None:
        """As `rows`, in short, where all of them are plain; else None."""
        at = np.asarray(slots, np.int64)
        if not self._plain[at].all():
            return None
        assert bool(self._known[at].all()), f"a slot of {list(slots)} was never added"
        inverse = (1.0 / self._temperature[at]).astype(np.float32)
        return PlainRows(inverse, self._greedy[at], mix_all(self._key[at] + np.asarray(positions, np.uint64)))

    def _grow(self, need: int) -> None:
        self._size = max(need, 2 * self._size, 64)
        for name in ("_known", "_temperature", "_greedy", "_top_k", "_top_p", "_min_p", "_logprobs", "_key", "_plain"):
            old = getattr(self, name)
            new = np.zeros(self._size, old.dtype)
            new[: len(old)] = old
            setattr(self, name, new)
