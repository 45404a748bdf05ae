"""Laws of the remaining-length estimate."""

import random

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.router.lengths import PRIOR_MEAN, LengthEstimator, LengthState

OBSERVATIONS = st.lists(st.tuples(st.integers(0, 5000), st.booleans()), max_size=60)


def learned(lengths: list[int], cap: int | None = None) -> LengthEstimator:
    """An estimator that saw these lengths, cut off at the cap."""
    e = LengthEstimator()
    for n in lengths:
        e.observe(n if cap is None else min(n, cap), censored=cap is not None and n >= cap)
    return e


def geometric(mean: float, n: int, seed: int) -> list[int]:
    rng = random.Random(seed)
    out = []
    for _ in range(n):
        k = 0
        while rng.random() > 1 / (mean + 1):
            k += 1
        out.append(k)
    return out


@settings(max_examples=80, deadline=None)
@given(OBSERVATIONS, st.integers(0, 500), st.lists(st.tuples(st.integers(-400, 400), st.integers(0, 600)), max_size=8))
def test_a_sum_is_the_sum_of_its_rows(observed, steps, rows) -> None:
    e = LengthEstimator()
    for n, censored in observed:
        e.observe(n, censored)
    rows = [(lead, cap) for lead, cap in rows if lead + steps >= 0]
    total = 3.5
    for lead, cap in rows:
        total += e.expected_remaining(lead + steps, cap)
    assert e.expected_sum(3.5, steps, rows) == total


@settings(max_examples=80, deadline=None)
@given(OBSERVATIONS, st.integers(0, 10**7), st.integers(0, 10**7))
def test_never_negative_and_never_above_what_the_cap_leaves(observed, so_far, cap) -> None:
    e = LengthEstimator()
    for n, censored in observed:
        e.observe(n, censored)
    left = e.expected_remaining(so_far, cap)
    assert 0.0 <= left <= max(0, cap - so_far)


@settings(max_examples=60, deadline=None)
@given(OBSERVATIONS, st.integers(0, 3000), st.integers(1, 3000), st.integers(1, 3000))
def test_a_higher_cap_never_expects_less(observed, so_far, room, more) -> None:
    e = LengthEstimator()
    for n, censored in observed:
        e.observe(n, censored)
    low, high = so_far + room, so_far + room + more
    assert e.expected_remaining(so_far, low) <= e.expected_remaining(so_far, high) * (1 + 1e-9) + 1e-9


@settings(max_examples=40, deadline=None)
@given(OBSERVATIONS, st.integers(0, 2000), st.integers(1, 300))
def test_the_closed_form_equals_the_sum_over_survival(observed, so_far, room) -> None:
    """E[min(L, cap) - n | L >= n] is the sum of P(L >= j | L >= n), and one token more at a time agrees with it."""
    e = LengthEstimator()
    for n, censored in observed:
        e.observe(n, censored)
    total, alive = 0.0, 1.0
    for n in range(so_far, so_far + room):
        alive *= e.expected_remaining(n, n + 1)  # the probability of one more token
        total += alive
    assert e.expected_remaining(so_far, so_far + room) == pytest.approx(total, rel=1e-6, abs=1e-9)


@settings(max_examples=40, deadline=None)
@given(OBSERVATIONS)
def test_running_requests_teach_what_finished_ones_do(observed) -> None:
    """Reporting progress token by token equals reporting once; the state survives serialisation."""
    at_once, stepwise = LengthEstimator(), LengthEstimator()
    for n, censored in observed:
        at_once.observe(n, censored)
        for at in range(0, n, 7):
            stepwise.advance(at, min(n, at + 7))
        if not censored:
            stepwise.end(n)
    again = LengthEstimator(msgspec.json.decode(msgspec.json.encode(at_once.state()), type=LengthState))
    for so_far, cap in ((0, 100), (0, 10**6), (37, 4000), (999, 1000)):
        want = at_once.expected_remaining(so_far, cap)
        assert stepwise.expected_remaining(so_far, cap) == pytest.approx(want, rel=1e-9)
        assert again.expected_remaining(so_far, cap) == want


def test_before_anything_was_seen_it_is_the_prior() -> None:
    e = LengthEstimator()
    assert e.expected_remaining(0, 10**7) == pytest.approx(PRIOR_MEAN, rel=1e-6)
    assert e.expected_remaining(500, 10**7) == pytest.approx(PRIOR_MEAN, rel=1e-6)
    assert e.expected_remaining(0, 10) == pytest.approx(10, rel=0.03)


@pytest.mark.parametrize("mean", [3, 40, 300])
def test_a_memoryless_length_has_the_same_remainder_everywhere(mean) -> None:
    lengths = geometric(mean, 4000, seed=1)
    e = learned(lengths)
    empirical = sum(lengths) / len(lengths)
    assert e.expected_remaining(0, 10**6) == pytest.approx(empirical, rel=0.1)
    for so_far in (mean // 2, mean, 2 * mean):
        assert e.expected_remaining(so_far, 10**6) == pytest.approx(empirical, rel=0.2)


@pytest.mark.parametrize(
    "lengths",
    [[100] * 2000, [7] * 2000, [20, 400] * 1000, list(range(1, 501)) * 4, [1000] * 1500 + [10] * 500],
    ids=["constant", "short", "two-point", "uniform", "skewed"],
)
def test_it_converges_to_the_mean(lengths) -> None:
    lengths = random.Random(3).sample(lengths, len(lengths))
    assert learned(lengths).expected_remaining(0, 10**6) == pytest.approx(sum(lengths) / len(lengths), rel=0.1)


def test_it_is_conditional_on_the_tokens_so_far() -> None:
    """Of lengths 20 and 400, one that has 100 tokens is a long one."""
    e = learned([20, 400] * 1000)
    assert e.expected_remaining(0, 10**6) == pytest.approx(210, rel=0.1)
    assert e.expected_remaining(100, 10**6) == pytest.approx(300, rel=0.15)
    assert e.expected_remaining(100, 150) == pytest.approx(50, rel=0.02)


@pytest.mark.parametrize("mean", [60, 200])
def test_censoring_does_not_bias(mean) -> None:
    """Half of the requests are cut off at random caps: the estimate stays; the mean of finished ones is far off."""
    lengths = geometric(mean, 6000, seed=5)
    rng = random.Random(6)
    e, finished = LengthEstimator(memory=1e9), []
    for n in lengths:
        cap = rng.randrange(1, 2 * mean)
        e.observe(min(n, cap), censored=n >= cap)
        if n < cap:
            finished.append(n)
    naive = sum(finished) / len(finished)
    assert naive < 0.7 * mean
    assert e.expected_remaining(0, 10**6) == pytest.approx(mean, rel=0.1)


def test_all_censored_expects_more_than_was_seen() -> None:
    e = learned([10_000] * 50, cap=1000)
    assert e.expected_remaining(0, 1000) > 950
    assert e.expected_remaining(0, 10**6) > 10_000


def test_it_follows_a_change_of_traffic() -> None:
    e = LengthEstimator(memory=200)
    for n in [1000] * 500 + [50] * 1500:
        e.observe(n, censored=False)
    assert e.expected_remaining(0, 10**6) == pytest.approx(50, rel=0.15)
