"""Exact division in proportion."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evener.ledger.divide import divide

weights = st.lists(st.integers(0, 10**9), min_size=1, max_size=8).filter(any)


@given(st.integers(0, 10**12), weights)
def test_parts_sum_to_the_total_and_are_in_proportion(total: int, of: list[int]) -> None:
    parts = divide(total, of)
    assert sum(parts) == total and min(parts) >= 0
    for part, weight in zip(parts, of, strict=True):
        assert abs(part - total * weight / sum(of)) < len(of) + total * 1e-12
        assert weight or not part


@given(st.integers(0, 300), st.integers(0, 300), st.lists(st.integers(0, 40), min_size=1, max_size=6).filter(any))
def test_no_part_falls_when_the_total_grows(a: int, b: int, of: list[int]) -> None:
    small, large = divide(min(a, b), of), divide(max(a, b), of)
    assert all(x <= y for x, y in zip(small, large, strict=True))


@given(weights)
def test_a_total_of_the_weights_gives_the_weights(of: list[int]) -> None:
    assert divide(sum(of), of) == of


def test_nothing_needs_no_weights_and_something_needs_one() -> None:
    assert divide(0, [0, 0]) == [0, 0]
    with pytest.raises(AssertionError, match="cannot divide 5"):
        divide(5, [0, 0])
