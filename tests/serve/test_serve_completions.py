"""/v1/completions through OpenAI's own client."""

import asyncio
from collections.abc import Callable

import pytest
from fake import EOS, MODEL, FakeEngine, ids
from openai import APIStatusError, AsyncOpenAI, BadRequestError

from evener.engine.request import Request
from evener.errors import Overloaded, WorkerLost

pytestmark = pytest.mark.anyio
Client = Callable[..., AsyncOpenAI]
FOX = " hello to the fox"


async def test_answer_and_usage(client: Client) -> None:
    engine = FakeEngine()
    done = await client(engine).completions.create(model=MODEL, prompt="the dog says", max_tokens=50)
    [choice] = done.choices
    assert (choice.text, choice.finish_reason, choice.index) == (FOX, "stop", 0)
    assert done.object == "text_completion"
    assert done.system_fingerprint.startswith("evener-")
    n_prompt, n_out = len(ids("the dog says")), len(ids(FOX)) + 1
    assert done.usage.model_dump(exclude_none=True) == {
        "prompt_tokens": n_prompt, "completion_tokens": n_out, "total_tokens": n_prompt + n_out,
        "prompt_tokens_details": {"cached_tokens": 0},
    }  # fmt: skip
    assert not engine.live


async def test_every_parameter_reaches_the_engine(client: Client) -> None:
    engine = FakeEngine()
    await client(engine).completions.create(
        model=MODEL, prompt="hi", max_tokens=7, temperature=0.25, top_p=0.5, presence_penalty=1, frequency_penalty=-1,
        seed=-3, logprobs=2, user="me",
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.5, "priority": -2, "stop_token_ids": [9]},
    )  # fmt: skip
    [request] = engine.submitted
    s = request.sampling
    assert (s.temperature, s.top_p, s.top_k, s.min_p) == (0.25, 0.5, 5, 0.1)
    assert (s.repetition_penalty, s.presence_penalty, s.frequency_penalty) == (1.5, 1, -1)
    assert (s.seed, s.choice, s.logprobs, s.prompt_logprobs) == (2**64 - 3, 0, 2, None)
    assert (request.max_tokens, request.priority, request.stop_token_ids) == (7, -2, (9, EOS))
    assert request.prompt == ids("hi")


async def test_defaults(client: Client) -> None:
    engine = FakeEngine(max_model_len=20)
    complete = client(engine).completions.create
    await complete(model=MODEL, prompt=[5])
    await complete(model=MODEL, prompt=[5] * 14)
    await complete(model=MODEL, prompt=[5], extra_body={"ignore_eos": True, "top_k": -1, "best_of": 1, "suffix": None})
    assert [r.max_tokens for r in engine.submitted] == [16, 6, 16]
    assert [r.stop_token_ids for r in engine.submitted] == [(EOS,), (EOS,), ()]
    assert engine.submitted[0].sampling.seed != engine.submitted[1].sampling.seed


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("hi", [ids("hi")]),
        (["hi", "fox"], [ids("hi"), ids("fox")]),
        ([7, 8], [[7, 8]]),
        ([[7], [8, 9]], [[7], [8, 9]]),
    ],
)
async def test_kinds_of_prompt(client: Client, prompt: object, expected: list[list[int]]) -> None:
    engine = FakeEngine(lambda r: ids(f" {r.prompt_len}"))
    done = await client(engine).completions.create(model=MODEL, prompt=prompt)
    assert [r.prompt for r in engine.submitted] == expected
    assert [(c.index, c.text) for c in done.choices] == [(k, f" {len(p)}") for k, p in enumerate(expected)]


async def test_choices_share_the_seed_and_come_in_order(client: Client) -> None:
    engine = FakeEngine(lambda r: ids(f"choice {r.sampling.choice}"))
    done = await client(engine).completions.create(model=MODEL, prompt=["hi", "fox"], n=3, max_tokens=30)
    assert [c.text for c in done.choices] == [f"choice {k}" for k in (0, 1, 2, 0, 1, 2)]
    assert len({r.sampling.seed for r in engine.submitted}) == 1
    assert [r.sampling.choice for r in engine.submitted] == [0, 1, 2, 0, 1, 2]
    assert done.usage.prompt_tokens == len(ids("hi")) + len(ids("fox"))


async def test_stop_string_across_tokens_ends_the_sequence(client: Client) -> None:
    engine = FakeEngine(" hello to the fox and on and on")
    complete = client(engine).completions.create
    done = await complete(model=MODEL, prompt="hi", max_tokens=99, stop=["zebra", "o th"])
    [choice] = done.choices
    assert (choice.text, choice.finish_reason, choice.stop_reason) == (" hello t", "stop", "o th")
    assert list(engine.cancelled.values()) == [True]
    assert not engine.live
    kept = await complete(
        model=MODEL, prompt="hi", max_tokens=99, stop="o th", extra_body={"include_stop_str_in_output": True}
    )
    assert kept.choices[0].text == " hello to th"


async def test_stop_token_of_the_client_is_named(client: Client) -> None:
    [stop] = ids(" fox")
    done = await client(FakeEngine()).completions.create(
        model=MODEL, prompt="hi", max_tokens=99, extra_body={"stop_token_ids": [stop]}
    )
    assert (done.choices[0].text, done.choices[0].stop_reason) == (" hello to the", stop)


async def test_logprobs(client: Client) -> None:
    done = await client(FakeEngine()).completions.create(model=MODEL, prompt="hi", max_tokens=99, logprobs=2)
    lp = done.choices[0].logprobs
    assert "".join(lp.tokens) == FOX
    assert lp.token_logprobs == [-0.5] * len(lp.tokens)
    assert [FOX[at:][: len(t)] for at, t in zip(lp.text_offset, lp.tokens, strict=True)] == lp.tokens
    assert all(len(top) == 2 and t in top for t, top in zip(lp.tokens, lp.top_logprobs, strict=True))


async def test_logprobs_end_where_the_text_does(client: Client) -> None:
    done = await client(FakeEngine()).completions.create(
        model=MODEL, prompt="hi", max_tokens=99, logprobs=0, stop=" the"
    )
    choice = done.choices[0]
    assert choice.text == " hello to" == "".join(choice.logprobs.tokens)


@pytest.mark.parametrize("stream", [False, True])
async def test_echo_with_prompt_logprobs_and_no_output(client: Client, stream: bool) -> None:
    engine = FakeEngine()
    got = await client(engine).completions.create(
        model=MODEL, prompt="the fox", max_tokens=0, echo=True, logprobs=1, stream=stream
    )
    choices = [c.choices[0] async for c in got] if stream else got.choices
    [choice] = choices
    assert (choice.text, choice.finish_reason) == ("the fox", "length")
    tokens = choice.logprobs.tokens
    assert "".join(tokens) == "the fox"
    assert choice.logprobs.token_logprobs == [None] + [-0.5] * (len(tokens) - 1)
    assert choice.logprobs.top_logprobs[0] is None
    assert choice.logprobs.text_offset == [sum(map(len, tokens[:k])) for k in range(len(tokens))]
    assert engine.submitted[0].sampling.prompt_logprobs == 1
    if not stream:
        assert got.usage.completion_tokens == 0


async def test_echo_comes_before_the_answer(client: Client) -> None:
    complete = client(FakeEngine()).completions.create
    done = await complete(model=MODEL, prompt=ids("the dog says"), max_tokens=99, echo=True, logprobs=1)
    text = "the dog says" + FOX
    assert done.choices[0].text == text == "".join(done.choices[0].logprobs.tokens)
    lp = done.choices[0].logprobs
    assert [text[at:][: len(t)] for at, t in zip(lp.text_offset, lp.tokens, strict=True)] == lp.tokens
    plain = await complete(model=MODEL, prompt="the dog says", max_tokens=99, echo=True)
    assert plain.choices[0].text == text
    assert plain.choices[0].logprobs is None


async def test_stream(client: Client) -> None:
    engine = FakeEngine(lambda r: ids(f" fox {r.sampling.choice}"))
    stream = await client(engine).completions.create(
        model=MODEL, prompt="hi", n=2, max_tokens=50, stream=True, stream_options={"include_usage": True}, logprobs=0
    )
    chunks = [c async for c in stream]
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert "".join(c.text for c in mine) == f" fox {index}"
        assert [c.finish_reason for c in mine] == [None] * (len(mine) - 1) + ["stop"]
        offsets = [at for c in mine if c.logprobs for at in c.logprobs.text_offset]
        assert offsets == sorted(set(offsets))
    assert chunks[-1].choices == []
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + chunks[-1].usage.completion_tokens
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)


async def test_stream_with_running_usage(client: Client) -> None:
    stream = await client(FakeEngine()).completions.create(
        model=MODEL, prompt="hi", max_tokens=3, stream=True, stream_options={"continuous_usage_stats": True}
    )
    assert [c.usage.completion_tokens async for c in stream] == [1, 2, 3]


async def test_cached_tokens(client: Client) -> None:
    complete = client(FakeEngine()).completions.create
    cached = [
        (await complete(model=MODEL, prompt=[5] * 40)).usage.prompt_tokens_details.cached_tokens for _ in range(2)
    ]
    assert cached == [0, 32]


async def test_overloaded_says_when_to_come_back(client: Client) -> None:
    for stream in (False, True):
        engine = FakeEngine(refuse=Overloaded("queue full (1024 of 1024); try later", retry_after_s=2.5))
        with pytest.raises(APIStatusError) as caught:
            await client(engine).completions.create(model=MODEL, prompt="hi", n=2, stream=stream)
        assert (caught.value.status_code, caught.value.code) == (429, "overloaded")
        assert caught.value.response.headers["retry-after"] == "3"
        assert "queue full" in caught.value.message


async def test_a_lost_worker_fails_its_requests_with_the_reason(client: Client) -> None:
    engine = FakeEngine(fail_after=(2, WorkerLost("cpu:1", "killed by signal 9")))
    with pytest.raises(APIStatusError) as caught:
        await client(engine).completions.create(model=MODEL, prompt="hi", n=2)
    assert (caught.value.status_code, caught.value.code) == (503, "worker_lost")
    assert "cpu:1 lost: killed by signal 9" in caught.value.message
    assert not engine.live


async def test_context_length_error_has_the_numbers(client: Client) -> None:
    with pytest.raises(BadRequestError, match=r"256 tokens, but you asked for 260 \(10 in the prompt, 250") as caught:
        await client(FakeEngine()).completions.create(model=MODEL, prompt=[5] * 10, max_tokens=250)
    assert caught.value.code == "context_length_exceeded"


async def test_a_reply_of_half_a_character_is_marked(client: Client) -> None:
    def half(request: Request) -> list[int]:
        return ids("\U0001f999")[:1]

    done = await client(FakeEngine(half)).completions.create(model=MODEL, prompt="hi", max_tokens=1)
    assert done.choices[0].text == "\ufffd"


async def test_a_long_prompt_does_not_block_others(client: Client) -> None:
    engine = FakeEngine(max_model_len=100_000)
    complete = client(engine).completions.create
    long, short = "the fox jumps " * 10_000, "hi"
    texts = [c.choices[0].text for c in await asyncio.gather(*(complete(model=MODEL, prompt=p) for p in (long, short)))]
    assert texts[0].startswith(texts[1])
    assert [r.prompt_len > 1000 for r in engine.submitted] == [False, True]
