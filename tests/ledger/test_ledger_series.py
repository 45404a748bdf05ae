"""Cumulative counters and their windows."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evener.ledger.series import Series
from evener.units import Nanoseconds


@given(st.integers(0, 10_000), st.integers(1, 200), st.integers(1, 30))
def test_windows_of_a_pruned_series_add_up(seed: int, every: int, keep: int) -> None:
    rng = random.Random(seed)
    series = Series(Nanoseconds(50), 3, 4, Nanoseconds(every), keep)
    truth = [(50, [0, 0, 0, 0])]
    for _ in range(200):
        cause, length = rng.randrange(3), rng.randint(0, 20)
        series.totals[cause] += length
        series.totals[3] += rng.randint(0, 5)
        series.until += length
        if series.until >= series.mark:
            series.checkpoint()
        truth.append((series.until, list(series.totals)))
    low = series.first
    a, b, c = sorted(rng.randint(low, series.until) for _ in range(3))
    one, two, both = series.between(a, b), series.between(b, c), series.between(a, c)
    assert min(one) >= 0 and min(two) >= 0
    assert [x + y for x, y in zip(one, two, strict=True)] == both
    assert sum(both[:3]) == c - a
    assert len(series._times) <= keep + keep // 4 + 1
    # At a checkpoint nothing is interpolated.
    assert series.at(low) in [t for at, t in truth if at == low]


def test_counters_that_are_appended_were_zero() -> None:
    series = Series(Nanoseconds(0), 1, 1, Nanoseconds(10), 100)
    series.totals[0], series.until = 10, 10
    series.checkpoint()
    series.totals += [0, 0]
    series.totals[0], series.totals[2], series.until = 20, 8, 20
    assert series.at(5) == [5, 0, 0]
    assert series.at(15) == [15, 0, 4]
    assert series.between(5, 20) == [15, 0, 8]


def test_time_that_is_forgotten_is_refused() -> None:
    series = Series(Nanoseconds(0), 1, 1, Nanoseconds(1), 4)
    for k in range(1, 50):
        series.totals[0] = series.until = k
        series.checkpoint()
    assert series.first > 1
    assert series.at(0) == [0], "the start is always known"
    with pytest.raises(AssertionError, match="1 is not in"):
        series.at(1)
