"""Log-probabilities over a split vocabulary against log_softmax."""

import numpy as np
import pytest
import torch
from vocab_ranks import SPLITS, intervals, logits, on_ranks

from evener.engine.batch import TokenLogprobs
from evener.engine.request import SamplingParams
from evener.execute.live.sampler import Sampler


def check(entry: TokenLogprobs, logits_V: torch.Tensor, token: int, top: int) -> None:
    want = torch.log_softmax(logits_V.double(), 0)
    assert entry.token == token
    assert entry.logprob == pytest.approx(float(want[token]), abs=1e-5)
    assert entry.rank == int((logits_V > logits_V[token]).sum()) + 1
    best = np.lexsort((np.arange(len(want)), -logits_V.numpy()))[:top].tolist()
    assert [t for t, _ in entry.top] == best
    assert [q for _, q in entry.top] == pytest.approx(want[best].tolist(), abs=1e-5)


@pytest.mark.parametrize("sizes", SPLITS)
@pytest.mark.parametrize("ties", [False, True])
def test_prompt_logprobs_equal_log_softmax(sizes, ties) -> None:
    x, top = logits(4, 40, 300, 2.0, ties), 5
    tokens = np.random.default_rng(0).integers(0, 300, 40).tolist()

    def job(group, rank, interval):
        sampler = Sampler(group, rank, interval, 300)
        return sampler.prompt_logprobs(x[:, interval[0] : interval[1]].contiguous(), tokens, top)

    for entries in on_ranks(intervals(sizes), job):
        assert len(entries) == 40
        for p, entry in enumerate(entries):
            check(entry, x[p], tokens[p], top)


@pytest.mark.parametrize("sizes", SPLITS)
def test_sampled_logprobs_are_raw_and_only_for_rows_that_asked(sizes) -> None:
    """Temperature, top_p and penalties change the choice, not the reported distribution."""
    params = [
        SamplingParams(logprobs=3, temperature=1.5, repetition_penalty=1.5),
        SamplingParams(temperature=0.0),
        SamplingParams(logprobs=0, top_p=0.5),
        SamplingParams(logprobs=20, temperature=0.0, presence_penalty=2.0),
    ]
    x = logits(9, 4, 300, 1.0)

    def job(group, rank, interval, params=params):
        sampler = Sampler(group, rank, interval, 300)
        for s, p in enumerate(params):
            sampler.add(s, list(range(0, 300, 3)), 10, p)
        mine = x[:, interval[0] : interval[1]].clone(memory_format=torch.contiguous_format)
        return sampler.sample(mine, range(len(params)), [50] * len(params))

    first, *others = on_ranks(intervals(sizes), job)
    assert sorted(first.logprobs) == [0, 2, 3]
    assert all(r.logprobs == {} and torch.equal(r.tokens, first.tokens) for r in others)
    for s, entry in first.logprobs.items():
        check(entry, x[s], int(first.tokens[s]), params[s].logprobs)
    without = [SamplingParams(**{**{f: getattr(p, f) for f in p.__struct_fields__}, "logprobs": None}) for p in params]
    again = on_ranks(intervals(sizes), lambda g, r, i: job(g, r, i, without))[0]
    assert torch.equal(again.tokens, first.tokens), "asking for logprobs changes no token"


def test_all_rows_asking_with_penalties_still_reports_the_raw_distribution() -> None:
    x = logits(10, 2, 300, 1.0)
    sampler = Sampler(None, 0, (0, 300), 300)
    for s in range(2):
        sampler.add(s, list(range(150)), 0, SamplingParams(logprobs=2, frequency_penalty=1.0))
    got = sampler.sample(x.clone(), [0, 1], [0, 0])
    for s in range(2):
        check(got.logprobs[s], x[s], int(got.tokens[s]), 2)


def test_more_alternatives_than_tokens_gives_all_tokens() -> None:
    x = logits(12, 1, 6, 1.0)
    entry = Sampler(None, 0, (0, 6), 6).prompt_logprobs(x, [2], 20)[0]
    check(entry, x[0], 2, 6)
