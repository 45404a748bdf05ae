"""Scans over logits: equal to the reference, exact on ties, and a fair sample."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evener import kernels
from evener.kernels import reference

use_fixture = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
width = st.one_of(st.integers(1, 70), st.sampled_from([8191, 8192, 8193, 20000]))


def logits_of(rows: int, width: int, seed: int, ties: bool) -> torch.Tensor:
    logits = torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * 3
    return logits.round() if ties else logits


@use_fixture
@given(rows=st.integers(1, 4), width=width, seed=st.integers(0, 99), ties=st.booleans(), k=st.integers(1, 70))
def test_scans_equal_reference(isa: str, rows: int, width: int, seed: int, ties: bool, k: int) -> None:
    logits = logits_of(rows, width, seed, ties)
    for got, expected in zip(kernels.argmax_rows(logits), reference.argmax_rows(logits), strict=True):
        assert torch.equal(got, expected)
    k = min(k, width)
    for got, expected in zip(kernels.top_candidates(logits, k), reference.top_candidates(logits, k), strict=True):
        assert torch.equal(got, expected)
    torch.testing.assert_close(kernels.logsumexp_rows(logits), torch.logsumexp(logits.double(), 1).float())


@use_fixture
@given(
    width=width,
    seed=st.integers(0, 99),
    offset=st.sampled_from([0, 1, 50_000]),
    temperature=st.sampled_from([0.1, 1.0, 3.0]),
    floor=st.sampled_from([-math.inf, 0.0, 5.0]),
)
def test_gumbel_argmax_equals_reference(
    isa: str, width: int, seed: int, offset: int, temperature: float, floor: float
) -> None:
    logits = logits_of(3, width, seed, False)
    key = torch.tensor([seed, -(2**63) + seed, 2**62 + 1])
    args = (logits, torch.full((3,), 1 / temperature), key, offset, torch.full((3,), floor))
    (index, score), (expected, expected_score) = kernels.gumbel_argmax(*args), reference.gumbel_argmax(*args)
    assert torch.equal(index, expected)
    torch.testing.assert_close(score, expected_score, rtol=1e-5, atol=1e-5)
    unsigned = kernels.gumbel_argmax(*args[:2], key.view(torch.uint64), *args[3:])
    assert torch.equal(unsigned[0], index) and torch.equal(unsigned[1], score)


@use_fixture
@given(width=width, seed=st.integers(0, 99), greedy=st.lists(st.booleans(), max_size=6), threads=st.integers(1, 2))
def test_choose_rows_is_argmax_or_gumbel_argmax(
    isa: str, width: int, seed: int, greedy: list[bool], threads: int
) -> None:
    rows = len(greedy)
    logits, key = logits_of(rows, width, seed, False), torch.arange(rows) + 2**40 * seed
    inverse, which = torch.full((rows,), 1 / 0.7), torch.tensor(greedy, dtype=torch.bool)
    kernels.set_threads(threads)
    index, score = kernels.choose_rows(logits, inverse, key, which, 77)
    kernels.set_threads(1)
    best, top = kernels.argmax_rows(logits)
    drawn, noisy = kernels.gumbel_argmax(logits, inverse, key, 77, torch.full((rows,), -math.inf))
    assert torch.equal(index, torch.where(which, best, drawn))
    assert torch.equal(score, torch.where(which, top, noisy))
    assert torch.equal(index, reference.choose_rows(logits, inverse, key, which, 77)[0])
    with pytest.raises(ValueError, match="greedy_S"):
        kernels.choose_rows(logits, inverse, key, which.int(), 77)


def test_noise_is_the_reference(isa: str) -> None:
    """Over the whole range of the uniform, its finest steps included: the bits are the same, the logarithms close."""
    key = torch.tensor([1, 2**40])
    index = torch.arange(200_000).repeat(2, 1)
    noise = kernels.gumbel_noise(key, index)
    torch.testing.assert_close(noise, reference.gumbel_noise(key, index), rtol=2e-6, atol=2e-6)
    assert noise.isfinite().all() and noise.max() > 11
    w = reference.uniform(key, index)
    assert ((w > 0) & (w < 1)).all()


def test_bits_are_the_documented_function() -> None:
    """In plain integers, for one key and index."""
    key, index, m64, m32 = 12345, 678, 2**64 - 1, 2**32 - 1
    z = (key + 0x9E3779B97F4A7C15) & m64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & m64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & m64
    z ^= z >> 31

    def mix(x: int) -> int:
        x = ((x ^ (x >> 16)) * 0x7FEB352D) & m32
        x = ((x ^ (x >> 15)) * 0x846CA68B) & m32
        return x ^ (x >> 16)

    expected = mix((mix(index ^ (z & m32)) + (z >> 32)) & m32)
    assert reference.random_bits(torch.tensor([key]), torch.tensor([[index]])).item() == expected


def test_gumbel_argmax_samples_the_softmax(isa: str) -> None:
    """Chi-square over 20,000 consecutive keys, 7 outcomes: below the 1 - 1e-6 quantile of 6 degrees of freedom."""
    n, logits = 20_000, torch.tensor([0.0, 1.0, -1.0, 2.0, 0.5, 0.5, -3.0])
    probability = logits.softmax(0)
    index, _ = kernels.gumbel_argmax(
        logits.repeat(n, 1), torch.ones(n), torch.arange(n), 0, torch.full((n,), -torch.inf)
    )
    seen = index.bincount(minlength=7)
    chi_square = ((seen - n * probability) ** 2 / (n * probability)).sum().item()
    assert chi_square < 38.3, (seen, n * probability)


@use_fixture
@given(cut=st.integers(1, 299), seed=st.integers(0, 99))
def test_split_vocabulary_gives_the_same_winner(isa: str, cut: int, seed: int) -> None:
    logits = logits_of(1, 300, seed, False)
    one, key, floor = torch.tensor([0.7]), torch.tensor([seed]), torch.tensor([-1.0])
    index, score = kernels.gumbel_argmax(logits, one, key, 0, floor)
    left = kernels.gumbel_argmax(logits[:, :cut], one, key, 0, floor)
    right = kernels.gumbel_argmax(logits[:, cut:], one, key, cut, floor)
    best_index, best_score = left if left[1] > right[1] else (right[0] + cut, right[1])
    assert torch.equal(best_index, index) and torch.equal(best_score, score)


def test_nothing_reaches_the_floor(isa: str) -> None:
    index, score = kernels.gumbel_argmax(
        torch.zeros(1, 20), torch.ones(1), torch.tensor([3]), 0, torch.tensor([torch.inf])
    )
    assert index.item() == 0 and score.item() == -math.inf


def test_rows_of_minus_infinity(isa: str) -> None:
    logits = torch.full((2, 40), -torch.inf)
    logits[1, 7] = 2.5
    assert kernels.argmax_rows(logits)[0].tolist() == [0, 7]
    assert kernels.logsumexp_rows(logits).tolist() == [-math.inf, 2.5]
    assert kernels.top_candidates(logits, 3)[1].tolist() == [[0, 1, 2], [7, 0, 1]]


def test_results_do_not_depend_on_threads_or_batch(isa: str) -> None:
    logits = logits_of(3, 50_000, 1, False)
    key, inverse, floor = torch.arange(3), torch.full((3,), 0.8), torch.full((3,), -5.0)

    def everything(rows: slice) -> list[torch.Tensor]:
        x = logits[rows]
        drawn = kernels.gumbel_argmax(x, inverse[rows], key[rows], 0, floor[rows])
        return [*kernels.argmax_rows(x), kernels.logsumexp_rows(x), *kernels.top_candidates(x, 50), *drawn]

    alone = [torch.cat(parts) for parts in zip(*(everything(slice(r, r + 1)) for r in range(3)), strict=True)]
    kernels.set_threads(3)
    for got, expected in zip(everything(slice(0, 3)), alone, strict=True):
        assert torch.equal(got, expected)


def test_wrong_arguments_are_refused() -> None:
    logits = torch.zeros(2, 8)
    for k in (0, 9):
        with pytest.raises(ValueError, match=f"k = {k} candidates of 8 logits"):
            kernels.top_candidates(logits, k)
    with pytest.raises(ValueError, match="must be int64 or uint64"):
        kernels.gumbel_argmax(logits, torch.ones(2), torch.zeros(2), 0, torch.zeros(2))
    with pytest.raises(ValueError, match="V >= 1"):
        kernels.argmax_rows(torch.zeros(2, 0))
