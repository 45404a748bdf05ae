"""The bounds of `evener verify`: a divergence over the engine's best tokens and the rest as one, and outliers."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from evener.engine.batch import TokenLogprobs
from evener.verify import compare, divergence


def of(p: list[float], q: list[float], best: int) -> float:
    """Divergence where the engine (q) sends its `best` tokens and the reference (p) is known in full."""
    top = sorted(((t, math.log(x)) for t, x in enumerate(q)), key=lambda pair: -pair[1])[:best]
    return divergence(TokenLogprobs(top[0][0], top[0][1], 1, top), {t: math.log(x) for t, x in enumerate(p)})


weights = st.lists(st.floats(0.01, 1.0), min_size=4, max_size=12)


@given(data=st.data(), raw=weights, best=st.integers(1, 4))
def test_at_least_zero_and_at_most_the_whole_divergence(data: st.DataObject, raw: list[float], best: int) -> None:
    other = data.draw(st.lists(st.floats(0.01, 1.0), min_size=len(raw), max_size=len(raw)))
    p, q = [x / sum(raw) for x in raw], [x / sum(other) for x in other]
    whole = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    assert -1e-9 <= of(p, q, best) <= whole + 1e-9
    assert abs(of(p, p, best)) < 1e-9


def test_a_token_that_the_reference_rules_out() -> None:
    """All of the engine's mass elsewhere: the divergence is as large as that mass is certain."""
    top = [(7, math.log(0.999))]
    assert divergence(TokenLogprobs(7, top[0][1], 1, top), {}) == pytest.approx(-math.log(0.001), rel=1e-6)


def position(*logprobs: float) -> Any:
    """What the reference keeps of one position: tokens 0, 1, ... in the order of their log-probabilities."""
    return SimpleNamespace(ids=torch.arange(len(logprobs)), logprobs=torch.tensor(logprobs), spread=10.0)


def engine(*tops: list[tuple[int, float]]) -> Any:
    """An answer to a prompt of one token, greedy, with these alternatives."""
    logprobs = [TokenLogprobs(top[0][0], top[0][1], 1, top) for top in tops]
    return SimpleNamespace(
        outputs=[SimpleNamespace(token_ids=[top[0][0] for top in tops], logprobs=logprobs)], prompt_logprobs=None
    )


def test_positions_beyond_the_tolerance_are_counted_in_narrow_formats() -> None:
    """One near, one further off, and one whose second token the reference has not kept: no likelier than its last."""
    kept = [position(-0.5, -2.0)] * 3
    ours = engine([(0, -0.6), (1, -2.1)], [(0, -0.5), (1, -4.0)], [(0, -0.5), (7, -1.2)])
    reference = cast(Any, SimpleNamespace(positions=lambda tokens, start: kept))
    narrow = compare(reference, [5], ours, tolerance=0.05, exact=False)
    assert narrow.beyond == 2 and narrow.worst == pytest.approx(0.2) and narrow.verdict == "equal"
    exact = compare(reference, [5], ours, tolerance=0.05, exact=True)
    assert exact.beyond == 2 and exact.worst == math.inf and exact.verdict == "wrong"
