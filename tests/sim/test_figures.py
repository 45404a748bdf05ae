"""Online figures: exact for few values, within their stated error for many."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evener.execute.sim.figures import KEEP, RELATIVE_ERROR, Distribution, Figures
from evener.execute.sim.traffic import Outcome
from evener.units import Nanoseconds


@given(st.lists(st.floats(0, 1e12), min_size=1, max_size=200), st.floats(0, 1))
def test_few_values_are_exact(values: list[float], q: float) -> None:
    """The same as numpy's linear interpolation."""
    distribution = Distribution()
    for value in values:
        distribution.add(value)
    assert distribution.quantile(q) == pytest.approx(float(np.quantile(values, q)), rel=1e-9, abs=1e-9)


def test_many_values_keep_the_stated_error() -> None:
    """Past KEEP values only counts are held, and percentiles are off by RELATIVE_ERROR at most."""
    values = np.random.default_rng(1).lognormal(20, 2, KEEP * 3)
    distribution = Distribution()
    for value in values:
        distribution.add(float(value))
    assert distribution._values is None and len(distribution._buckets) < 3000
    for q in (0.01, 0.5, 0.9, 0.99, 0.999):
        exact = float(np.quantile(values, q, method="lower"))
        assert distribution.quantile(q) == pytest.approx(exact, rel=1.05 * RELATIVE_ERROR)
    assert distribution.total == pytest.approx(values.sum())


def test_no_values_have_no_percentiles() -> None:
    """Nothing is made up."""
    assert Distribution().summary().p50 is None and Distribution().quantile(0.5) is None


def test_figures_count_what_met_the_bounds() -> None:
    """Goodput and shares follow the definitions of the load client."""
    figures = Figures(ttft_ns=1e9, tpot_ns=1e8)
    second = 10**9

    def ended(arrival: int, first: int | None, end: int, tokens: int, finish: str) -> None:
        times = (Nanoseconds(arrival), None if first is None else Nanoseconds(first), Nanoseconds(end))
        figures(Outcome("q", *times, tokens, finish, 10))

    ended(0, second, 2 * second, 11, "length")  # both bounds met: 1 s, then 0.1 s a token
    ended(0, second + 1, 2 * second, 11, "stop")  # first token a nanosecond late
    ended(0, second, 2 * second, 10, "stop")  # 0.11 s a token
    ended(0, second, second, 1, "stop")  # one token has no TPOT
    ended(0, None, second, 0, "cancelled")
    report = figures.report()
    assert (report.requests, report.completed, report.failures) == (5, 4, {"cancelled": 1})
    assert report.goodput_req_s == 1.0 and report.met == 0.4
    assert report.output_tok_s == 33 / 2 and report.total_tok_s == 73 / 2
    assert report.tpot_ms.max == pytest.approx(1000 / 9)
