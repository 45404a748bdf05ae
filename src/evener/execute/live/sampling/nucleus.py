"""Which tokens top-k, top-p and min-p keep, decided from the ranks' best candidates. Pure numpy.

All three keep the tokens whose logit reaches a *cut*, so the set depends on values only, not on how ties are ordered:

    min_p   logit >= largest + temperature * log(min_p)
    top_k   logit >= the k-th largest (ties with it are kept, as in vLLM and transformers)
    top_p   the probability mass strictly above the logit is < top_p, among what min_p and top_k kept, renormalised
            (Holtzman et al., arXiv:1904.09751)

Every rank sends its largest logits in descending order. The last one of a rank that has more is its *floor*: above
the highest floor F all tokens of the vocabulary are listed, at or below it some may be missing. A row is `resolved`
when its cut is proven from the listed tokens above F, and its kept set is listed.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

F32 = NDArray[np.float32]
F64 = NDArray[np.float64]
I32 = NDArray[np.int32]
I64 = NDArray[np.int64]


class Candidates(NamedTuple):
    """The merged candidates of F rows, logits in descending order."""

    logit_FM: F32
    """-inf where there is none."""
    index_FM: I32
    """Vocabulary index."""
    score_FM: F32
    """logit / temperature + Gumbel noise, computed by the rank that owns the token."""
    floor_F: F32
    """F; -inf when nothing is missing."""


class Cuts(NamedTuple):
    """What is known about the cut of each row."""

    cut_F: F32
    """Kept are exactly the tokens with logit >= cut (resolved rows); otherwise a lower bound of the cut."""
    resolved_F: NDArray[np.bool_]
    mass_F: F64
    """Mass kept by min_p and top_k, in units of exp((logit - largest) / temperature); nan: not known yet."""
    largest_F: F32
    floor_F: F32
    """F, see `Candidates`."""

    def take(self, at: I64) -> "Cuts":
        """The rows `at`, copied."""
        return Cuts(self.cut_F[at], self.resolved_F[at], self.mass_F[at], self.largest_F[at], self.floor_F[at])


def merge(logit_RFC: F32, index_RFC: I32, score_RFC: F32) -> Candidates:
    """Merge what R ranks sent, C candidates each in descending order, padded with -inf."""
    floor_F = logit_RFC[:, :, -1].max(axis=0)
    ranks, rows, width = logit_RFC.shape
    if ranks == 1:
        return Candidates(logit_RFC[0], index_RFC[0], score_RFC[0], floor_F)
    shape = (rows, ranks * width)
    logit = logit_RFC.transpose(1, 0, 2).reshape(shape)
    index = index_RFC.transpose(1, 0, 2).reshape(shape)
    score = score_RFC.transpose(1, 0, 2).reshape(shape)
    order = np.argsort(-logit, axis=1, kind="stable")
    merged_logit = np.take_along_axis(logit, order, axis=1)
    return Candidates(
        merged_logit, np.take_along_axis(index, order, axis=1), np.take_along_axis(score, order, axis=1), floor_F
    )


def cuts(c: Candidates, temperature_F: F64, top_k_F: I64, top_p_F: F64, min_p_F: F64, mass_F: F64) -> Cuts:
    """Find each row's cut. `mass_F` is the mass of the whole vocabulary (nan where nobody asked for it)."""
    largest_F = c.logit_FM[:, 0]
    with np.errstate(divide="ignore"):
        min_cut = _round_up(largest_F + temperature_F * np.log(min_p_F))
    last = np.clip(top_k_F - 1, 0, c.logit_FM.shape[1] - 1)
    k_cut = np.where(top_k_F > 0, np.take_along_axis(c.logit_FM, last[:, None], axis=1)[:, 0], -np.inf)
    cut = np.maximum(min_cut, k_cut).astype(np.float32)
    # -inf means "all tokens": complete only if nothing is missing, which a floor of -inf says.
    complete = (cut > c.floor_F) | (c.floor_F == -np.inf)
    if (top_p_F >= 1).all():
        return Cuts(cut, complete, mass_F, largest_F, c.floor_F)

    weight = mass_above_largest(c.logit_FM, largest_F, temperature_F)
    weight *= c.logit_FM >= cut[:, None]
    before = np.cumsum(weight, axis=1) - weight
    mass = np.where(complete, weight.sum(axis=1), np.where(cut == -np.inf, mass_F, np.nan))
    want = top_p_F * mass
    kept = ((before < want[:, None]) & (weight > 0)).sum(axis=1)
    p_cut = np.take_along_axis(c.logit_FM, np.maximum(kept - 1, 0)[:, None], axis=1)[:, 0]
    covered = (weight * (c.logit_FM > c.floor_F[:, None])).sum(axis=1) >= want
    nucleus = top_p_F < 1
    found = complete | covered
    cut = np.where(nucleus & found, np.maximum(cut, p_cut), cut).astype(np.float32)
    return Cuts(cut, np.where(nucleus, found, complete), mass, largest_F, c.floor_F)


def mass_above_largest(logit_FM: F32, largest_F: F32, temperature_F: F64) -> F64:
    """exp((logit - largest) / temperature), fp64."""
    gap = logit_FM.astype(np.float64) - largest_F[:, None].astype(np.float64)
    return np.asarray(np.exp(gap / temperature_F[:, None]))


def choose(c: Candidates, cut_F: F32) -> I64:
    """The kept candidate of the highest score of each row; ties go to the lowest index."""
    score = np.where(c.logit_FM >= cut_F[:, None], c.score_FM, -np.inf)
    return lowest_best(score, c.index_FM)


def lowest_best(score_FM: NDArray[np.floating], index_FM: I32) -> I64:
    """The index of the highest score of each row, the lowest such index on ties."""
    best = score_FM.max(axis=1, keepdims=True)
    none = np.iinfo(np.int32).max
    lowest: I64 = np.where(score_FM == best, index_FM, none).min(axis=1).astype(np.int64)
    return lowest


def _round_up(x: F64) -> F32:
    """The least fp32 number that is not below x: comparing fp32 logits with either is the same."""
    with np.errstate(over="ignore"):
        y = x.astype(np.float32)
    return np.where(y.astype(np.float64) < x, np.nextafter(y, np.float32(np.inf)), y)
