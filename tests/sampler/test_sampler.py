"""The sampler against a plain reference, over splits of the vocabulary and mixtures of rows."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from vocab_ranks import SPLITS, choose, intervals, kept_set, logits, on_ranks, penalised

from evener.engine.request import SamplingParams
from evener.errors import EvenerError
from evener.execute.live.sampler import Sampled, Sampler


def sample(
    logits_SV: torch.Tensor,
    params: list[SamplingParams],
    sizes: list[int],
    tokens: list[list[int]] | None = None,
    prompt_len: int = 0,
    positions: list[int] | None = None,
) -> list[Sampled]:
    """One step on every rank; slots are deliberately not the row numbers."""
    slots = [3 * s + 1 for s in range(len(params))]
    positions = positions if positions is not None else list(range(7, 7 + len(params)))

    def job(group, rank, interval):
        sampler = Sampler(group, rank, interval, logits_SV.shape[1])
        for s, slot in enumerate(slots):
            sampler.add(slot, tokens[s] if tokens else [1, 2, 3], prompt_len, params[s])
        return sampler.sample(logits_SV[:, interval[0] : interval[1]].contiguous(), slots, positions)

    return on_ranks(intervals(sizes), job)


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 1.0, 1.7]),
    top_k=st.sampled_from([0, 0, 0, 1, 5, 63, 64, 65, 150, 300, 1000]),
    top_p=st.sampled_from([1.0, 1.0, 0.1, 0.5, 0.9, 0.99]),
    min_p=st.sampled_from([0.0, 0.0, 0.001, 0.05, 0.4]),
    seed=st.integers(0, 2**64 - 1),
    choice=st.integers(0, 3),
)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 1.0, 4.0]),
    ties=st.booleans(),
    params=st.lists(PARAMS, min_size=1, max_size=6),
    sizes=st.sampled_from(SPLITS),
)
def test_every_rank_chooses_the_reference_token(seed, scale, ties, params, sizes) -> None:
    x = logits(seed, len(params), 300, scale, ties)
    want = [choose(x[s], p, 7 + s) for s, p in enumerate(params)]
    for got in sample(x, params, sizes):
        assert got.tokens.tolist() == want
        assert got.logprobs == {}


@pytest.mark.parametrize("sizes", ([300], [37, 263], [100, 0, 200]))
@pytest.mark.parametrize("scale", [0.0, 0.05, 2.0])
@pytest.mark.parametrize(
    "p",
    [
        SamplingParams(top_k=7),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.2, temperature=0.5),
        SamplingParams(min_p=0.2),
        SamplingParams(top_k=90, top_p=0.7, min_p=0.01),
        SamplingParams(min_p=0.001, top_p=0.7),
    ],
)
def test_only_kept_tokens_are_drawn_and_all_of_them(p, scale, sizes) -> None:
    """Many positions of one row: the tokens that come up are the reference's set (where it is small) or inside it."""
    x = logits(5, 1, 300, scale)
    kept = set(torch.nonzero(kept_set(x[0], p)).flatten().tolist())
    n = 300
    rows = [p] * n
    got = set(sample(x.expand(n, -1).contiguous(), rows, sizes, positions=list(range(n)))[0].tokens.tolist())
    assert got <= kept
    if len(kept) <= 20:
        probabilities = torch.softmax(x[0].double() / p.temperature, 0)[sorted(kept)]
        likely = {
            t for t, q in zip(sorted(kept), (probabilities / probabilities.sum()).tolist(), strict=True) if q > 0.02
        }
        assert likely <= got


@pytest.mark.parametrize("p", [SamplingParams(temperature=0.7), SamplingParams(top_p=0.9), SamplingParams(top_k=12)])
@pytest.mark.parametrize("sizes", ([40], [13, 0, 27]))
def test_the_choice_follows_the_softmax(p, sizes) -> None:
    """Chi-square of 5,000 positions under a fixed seed against the exact probabilities."""
    x = logits(11, 1, 40, 1.0)
    want = torch.softmax(x[0].double() / p.temperature, 0) * kept_set(x[0], p)
    want = (want / want.sum()).numpy()
    n = 5_000
    drawn = sample(x.expand(n, -1).contiguous(), [p] * n, sizes, positions=list(range(n)))[0].tokens.numpy()
    seen = np.bincount(drawn, minlength=40)
    assert seen[want == 0].sum() == 0
    assert chisquare(seen[want > 0], want[want > 0] * n).pvalue > 0.001


def test_seeds_choices_and_positions_draw_independently() -> None:
    """2,000 rows that differ in one of the three only: as many distinct tokens as independent uniform draws give."""
    x = torch.zeros(2000, 1000)
    by = {
        "seed": [SamplingParams(seed=k) for k in range(2000)],
        "choice": [SamplingParams(choice=k) for k in range(2000)],
    }
    want = 1000 * (1 - (1 - 1 / 1000) ** 2000)
    for params in by.values():
        drawn = sample(x, params, [1000], positions=[0] * 2000)[0].tokens
        assert abs(len(drawn.unique()) - want) < 40
    drawn = sample(x, [SamplingParams()] * 2000, [1000], positions=list(range(2000)))[0].tokens
    assert abs(len(drawn.unique()) - want) < 40


@settings(max_examples=25, deadline=None)
@given(params=st.lists(PARAMS, min_size=2, max_size=8), seed=st.integers(0, 2**31), data=st.data())
def test_a_row_does_not_depend_on_the_rest_of_the_batch(params, seed, data) -> None:
    x = logits(seed, len(params), 300, 2.0)
    together = sample(x, params, [37, 263])[0].tokens.tolist()
    s = data.draw(st.integers(0, len(params) - 1))
    alone = sample(x[s : s + 1].clone(), [params[s]], [300], positions=[7 + s])[0].tokens.tolist()
    assert alone == [together[s]]


def test_penalties_equal_the_definition_for_known_and_noted_tokens() -> None:
    params = [
        SamplingParams(temperature=0.0, repetition_penalty=1.7),
        SamplingParams(temperature=0.0, presence_penalty=1.1),
        SamplingParams(temperature=0.0, frequency_penalty=0.6),
        SamplingParams(temperature=0.9, repetition_penalty=0.8, presence_penalty=-0.4, frequency_penalty=1.5),
        SamplingParams(temperature=0.0),
    ]
    tokens, noted = [5, 9, 5, 250, 250, 31, 31, 31], [9, 120, 120, 299, 31]
    x = logits(3, len(params), 300, 1.0)
    x[:, [5, 31, 250, 120]] += 4.0
    want = [penalised(x[s], tokens + noted, 4, p) for s, p in enumerate(params)]

    def job(group, rank, interval):
        sampler = Sampler(group, rank, interval, 300)
        for s, p in enumerate(params):
            sampler.add(s, tokens, 4, p)
            for t in noted:
                sampler.note([s], [t])
        mine = x[:, interval[0] : interval[1]].clone(memory_format=torch.contiguous_format)
        return sampler.sample(mine, range(len(params)), [20] * len(params)).tokens.tolist(), mine

    for sizes in ([300], [100, 0, 200]):
        got = on_ranks(intervals(sizes), job)
        assert torch.cat([mine for _, mine in got], dim=1).allclose(torch.stack(want), rtol=1e-5, atol=1e-5)
        for drawn, _ in got:
            assert drawn == [choose(want[s], p, 20) for s, p in enumerate(params)]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    from transformers import RepetitionPenaltyLogitsProcessor

    x, tokens = logits(8, 1, 300, 2.0), [4, 4, 77, 290]
    want = RepetitionPenaltyLogitsProcessor(1.3)(torch.tensor([tokens]), x.clone())
    sampler = Sampler(None, 0, (0, 300), 300)
    sampler.add(0, tokens, 2, SamplingParams(repetition_penalty=1.3))
    got = x.clone()
    sampler.sample(got, [0], [4])
    assert torch.equal(got, want)


def test_a_slot_that_is_reused_forgets_its_tokens() -> None:
    sampler = Sampler(None, 0, (0, 10), 10)
    x = torch.zeros(1, 10)
    x[0, 3] = 1.0
    sampler.add(0, [3, 3], 0, SamplingParams(temperature=0.0, presence_penalty=2.0))
    assert sampler.sample(x.clone(), [0], [2]).tokens.tolist() == [0]
    sampler.drop(0)
    sampler.add(0, [3, 3], 0, SamplingParams(temperature=0.0))
    assert sampler.sample(x.clone(), [0], [2]).tokens.tolist() == [3]
    sampler.add(0, [], 0, SamplingParams(temperature=0.0, presence_penalty=2.0))
    assert sampler.sample(x.clone(), [0], [2]).tokens.tolist() == [3]
    sampler.note([0], [3])
    assert sampler.sample(x.clone(), [0], [3]).tokens.tolist() == [0]


def test_many_slots_keep_their_own_parameters() -> None:
    sampler = Sampler(None, 0, (0, 50), 50)
    for slot in range(500):
        sampler.add(slot, [], 0, SamplingParams(seed=slot))
    x = torch.zeros(500, 50)
    got = sampler.sample(x, range(500), [0] * 500).tokens.tolist()
    assert got == [choose(x[0], SamplingParams(seed=slot), 0) for slot in range(500)]


def test_ties_go_to_the_lowest_index_over_ranks() -> None:
    x = torch.zeros(1, 300)
    for sizes in SPLITS:
        assert {int(r.tokens[0]) for r in sample(x, [SamplingParams(temperature=0.0)], sizes)} == {0}


def test_one_message_per_step_when_candidates_prove_the_cut() -> None:
    x = logits(1, 4, 300, 6.0)
    params = [
        SamplingParams(temperature=0.0),
        SamplingParams(),
        SamplingParams(top_k=20),
        SamplingParams(top_p=0.8, min_p=0.02),
    ]

    def job(group, rank, interval):
        sampler = Sampler(group, rank, interval, 300)
        for s, p in enumerate(params):
            sampler.add(s, [], 0, p)
        sampler.sample(x[:, interval[0] : interval[1]].contiguous(), range(4), [0] * 4)
        return group.gathers

    assert on_ranks(intervals([150, 150]), job) == [1, 1]


def test_low_temperature_keeps_its_precision() -> None:
    """Logits far from zero at a temperature near zero: the nucleus is the largest logit alone."""
    x = logits(2, 1, 300, 3.0) + 40.0
    for p in (SamplingParams(temperature=1e-5, top_p=0.9), SamplingParams(temperature=1e-5, min_p=0.5)):
        for sizes in ([300], [100, 200]):
            assert sample(x.clone(), [p], sizes)[0].tokens.tolist() == [int(x.argmax())]


def test_no_finite_logit_is_an_error_and_no_rows_is_none() -> None:
    bad = torch.full((2, 300), float("nan"))
    bad[0] = 1.0
    for p in (SamplingParams(temperature=0.0), SamplingParams(top_k=3)):
        with pytest.raises(EvenerError, match=r"rows \[1\]"):
            sample(bad.clone(), [p, p], [300])
    assert Sampler(None, 0, (0, 9), 9).sample(torch.zeros(0, 9), [], []).tokens.shape == (0,)
