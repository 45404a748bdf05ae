"""Arrival processes, lengths and request lists: the stated distribution, the same for the same seed."""

import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.errors import InvalidInput, InvalidTrace
from evener.workload import arrivals
from evener.workload.lengths import Fixed, InOrder, LogNormal, Uniform, parse_lengths
from evener.workload.requests import Text, TimedRequest, TokenIds, build_requests, parse_token_ids, token_ids_of


@settings(max_examples=30, deadline=None)
@given(
    rate=st.floats(0.01, 1000),
    burstiness=st.sampled_from([0.25, 0.5, 1.0, 2.0, 10.0]),
    seed=st.integers(0, 2**32),
)
def test_gamma_has_the_stated_mean_and_variation(rate: float, burstiness: float, seed: int) -> None:
    n = 20_000
    times = arrivals.gamma(n, rate, burstiness, np.random.default_rng(seed))
    gaps = np.diff(times, prepend=0.0)
    assert (gaps >= 0).all()
    cv = 1 / math.sqrt(burstiness)
    assert gaps.mean() * rate == pytest.approx(1.0, abs=6 * cv / math.sqrt(n))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.15)


def test_special_cases_of_gamma() -> None:
    poisson = arrivals.poisson(50, 3.0, np.random.default_rng(7))
    assert (arrivals.gamma(50, 3.0, 1.0, np.random.default_rng(7)) == poisson).all()
    even = arrivals.gamma(4, 2.0, math.inf, np.random.default_rng(7))
    assert even.tolist() == [0.5, 1.0, 1.5, 2.0]
    assert arrivals.at_once(3).tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("rate", [0.0, -1.0, math.inf, math.nan])
def test_impossible_rates(rate: float) -> None:
    with pytest.raises(InvalidTrace, match="rate"):
        arrivals.poisson(5, rate, np.random.default_rng(0))


@pytest.mark.parametrize("burstiness", [0.0, -2.0, math.nan])
def test_impossible_burstiness(burstiness: float) -> None:
    with pytest.raises(InvalidTrace, match="burstiness"):
        arrivals.gamma(5, 1.0, burstiness, np.random.default_rng(0))


def test_lengths_are_spelt() -> None:
    assert parse_lengths("128", "--x") == Fixed(128)
    assert parse_lengths("uniform:16:512", "--x") == Uniform(16, 512)
    assert parse_lengths("lognormal:180:0.8:16:1000", "--x") == LogNormal(180, 0.8, 16, 1000)
    assert parse_lengths("lognormal:180:0.8", "--x") == LogNormal(180, 0.8)


@pytest.mark.parametrize(
    "spec",
    ["", "0", "-3", "1.5", "inf", "nan", "many", "uniform:5", "uniform:9:3", "uniform:0:3", "uniform:1:x",
     "lognormal:0:1", "lognormal:10:-1", "lognormal:10:1:5", "lognormal:10:1:9:2", "zipf:2", "128:4"],
)  # fmt: skip
def test_bad_lengths_name_option_and_value(spec: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_lengths(spec, "--input-tokens")
    assert f"--input-tokens {spec!r}" in error.value.message


@settings(max_examples=30, deadline=None)
@given(low=st.integers(1, 100), more=st.integers(0, 1000), seed=st.integers(0, 1000))
def test_lengths_stay_in_bounds(low: int, more: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for lengths in (Uniform(low, low + more), LogNormal(50, 2.0, low, low + more)):
        drawn = lengths.draw(200, rng)
        assert drawn.min() >= low and drawn.max() <= low + more
        assert len(drawn) == 200
    drawn = Uniform(1, 2).draw(100, rng)
    assert set(drawn.tolist()) == {1, 2}


def test_lognormal_median() -> None:
    drawn = LogNormal(180, 0.8).draw(20_000, np.random.default_rng(0))
    assert float(np.median(drawn)) == pytest.approx(180, rel=0.03)
    assert float(np.log(drawn).std()) == pytest.approx(0.8, rel=0.03)


def test_lengths_of_a_trace_run_out() -> None:
    lengths = InOrder((5, 3, 8))
    assert lengths.draw(2, np.random.default_rng(0)).tolist() == [5, 3]
    with pytest.raises(InvalidInput, match="4 requests were asked for, the trace has 3"):
        lengths.draw(4, np.random.default_rng(0))


def build(seed: int) -> list[TimedRequest]:
    return build_requests(np.arange(20.0), Uniform(1, 50), Uniform(1, 9), TokenIds(5, 99), seed)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_the_seed_decides_everything(seed: int) -> None:
    requests = build(seed)
    assert requests == build(seed)
    assert requests != build(seed + 1)
    for k, r in enumerate(requests):
        assert r.index == k and r.arrival_s == float(k)
        assert len(r.prompt) == r.input_tokens
        assert all(5 <= int(t) < 99 for t in r.prompt)


def test_drawing_order_is_part_of_the_contract() -> None:
    rng = np.random.default_rng(3)
    inputs, outputs = rng.integers(1, 51, 20), rng.integers(1, 10, 20)
    prompts = [rng.integers(5, 99, k).tolist() for k in inputs]
    requests = build(3)
    assert [r.input_tokens for r in requests] == inputs.tolist()
    assert [r.output_tokens for r in requests] == outputs.tolist()
    assert [r.prompt for r in requests] == prompts


def test_special_ids_are_avoided() -> None:
    ids = TokenIds(0, 10, frozenset({0, 3, 4, 9})).draw(500, np.random.default_rng(0))
    assert set(ids) == {1, 2, 5, 6, 7, 8}
    with pytest.raises(InvalidInput, match="all special"):
        TokenIds(0, 2, frozenset({0, 1})).draw(1, np.random.default_rng(0))


def test_token_ids_are_spelt() -> None:
    assert parse_token_ids("100:200") == TokenIds(100, 200)
    for bad in ("", "5", "5:5", "9:3", "-1:4", "a:b"):
        with pytest.raises(InvalidInput, match="LOW:HIGH"):
            parse_token_ids(bad)


@pytest.mark.slow  # transformers takes seconds to import
def test_token_ids_of_a_tokenizer(tmp_path: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    vocab = {"<unk>": 0, "<s>": 1, "a": 2, "b": 3, "c": 4}
    raw = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>").save_pretrained(tmp_path)
    ids = token_ids_of(tmp_path).draw(200, np.random.default_rng(0))
    assert set(ids) == {2, 3, 4}
    with pytest.raises(InvalidInput, match="no tokenizer"):
        token_ids_of(tmp_path / "absent")


def test_text_prompts_have_as_many_words() -> None:
    prompt = Text().draw(30, np.random.default_rng(0))
    assert len(prompt.split()) == 30
