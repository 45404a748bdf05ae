"""/v1/chat/completions through OpenAI's own client."""

from collections.abc import Callable

import pytest
from fake import EOS, MODEL, FakeEngine, ids, tiny_tokenizer
from openai import APIError, AsyncOpenAI, BadRequestError

from evener.errors import WorkerLost

pytestmark = pytest.mark.anyio
Client = Callable[..., AsyncOpenAI]
USER = [{"role": "user", "content": "hello"}]
FOX = " hello to the fox"


def prompt_of(engine: FakeEngine) -> str:
    return tiny_tokenizer().decode(engine.submitted[-1].prompt)


async def test_answer(client: Client) -> None:
    engine = FakeEngine()
    done = await client(engine).chat.completions.create(model=MODEL, messages=USER)
    [choice] = done.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", FOX, "stop")
    assert (done.object, done.model, choice.logprobs) == ("chat.completion", MODEL, None)
    assert prompt_of(engine) == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    [request] = engine.submitted
    assert request.max_tokens == engine.max_model_len - request.prompt_len
    assert request.stop_token_ids == (EOS,)


async def test_messages_and_template_options(client: Client) -> None:
    engine = FakeEngine()
    chat = client(engine).chat.completions.create
    answer = (await chat(model=MODEL, messages=USER, max_completion_tokens=3)).choices[0].message
    again = [
        {"role": "system", "content": [{"type": "text", "text": "be"}, {"type": "text", "text": "brief"}]},
        answer.model_dump(),  # as OpenAI's client gives it, with its many nulls
        *USER,
    ]
    await chat(model=MODEL, messages=again, extra_body={"chat_template_kwargs": {"shout": "!"}, "tools": []})
    said = ["system\nbe\nbrief!", f"assistant\n{answer.content}!", "user\nhello!"]
    turns = "".join(f"<|im_start|>{s}<|im_end|>\n" for s in said)
    assert prompt_of(engine) == turns + "<|im_start|>assistant\n"
    await chat(model=MODEL, messages=USER, extra_body={"add_generation_prompt": False})
    assert prompt_of(engine) == "<|im_start|>user\nhello<|im_end|>\n"
    opened = [*USER, {"role": "assistant", "content": "the fox"}]
    await chat(model=MODEL, messages=opened, extra_body={"continue_final_message": True})
    assert prompt_of(engine).endswith("<|im_start|>assistant\nthe fox")


async def test_template_override_and_its_complaints(client: Client) -> None:
    engine = FakeEngine()
    await client(engine, chat_template="{{ messages[0]['content'] }}?").chat.completions.create(
        model=MODEL, messages=USER
    )
    assert prompt_of(engine) == "hello?"
    with pytest.raises(BadRequestError, match="no developers here"):
        await client(engine).chat.completions.create(model=MODEL, messages=[{"role": "developer", "content": "x"}])


async def test_logprobs(client: Client) -> None:
    done = await client(FakeEngine("é fox")).chat.completions.create(
        model=MODEL, messages=USER, logprobs=True, top_logprobs=3
    )
    content = done.choices[0].logprobs.content
    assert b"".join(bytes(t.bytes) for t in content).decode() == "é fox" == done.choices[0].message.content
    assert [t.token for t in content[:2]] == ["bytes:\\xc3", "bytes:\\xa9"]
    assert all(len(t.top_logprobs) == 3 and t.top_logprobs[0].token == t.token for t in content)
    alone = await client(FakeEngine()).chat.completions.create(model=MODEL, messages=USER, logprobs=True)
    assert alone.choices[0].logprobs.content[0].top_logprobs == []


@pytest.mark.parametrize("stop", [None, "the"])
async def test_stream_has_role_then_text_then_end(client: Client, stop: str | None) -> None:
    engine = FakeEngine(delay_s=0.001)
    stream = await client(engine).chat.completions.create(
        model=MODEL, messages=USER, n=2, stream=True, stream_options={"include_usage": True}, logprobs=True, stop=stop
    )
    chunks = [c async for c in stream]
    assert len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}
    for index in (0, 1):
        mine = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == index]
        assert (mine[0].delta.role, mine[0].delta.content) == ("assistant", "")
        text = "".join(c.delta.content or "" for c in mine)
        assert text == FOX.partition(stop or "!")[0]
        assert mine[-1].finish_reason == "stop"
        assert mine[-1].delta.content is None
        assert {c.finish_reason for c in mine[:-1]} == {None}
        tokens = [t for c in mine if c.logprobs for t in c.logprobs.content]
        assert "".join(t.token for t in tokens).startswith(text)
    assert (chunks[-1].choices, chunks[-1].usage.prompt_tokens) == ([], engine.submitted[0].prompt_len)
    assert sorted(engine.cancelled) == (sorted(r.request_id for r in engine.submitted) if stop else [])


async def test_an_error_within_a_stream_is_an_event_that_ends_it(client: Client) -> None:
    engine = FakeEngine(fail_after=(2, WorkerLost("cpu:1", "hung")))
    stream = await client(engine).chat.completions.create(model=MODEL, messages=USER, stream=True)
    got = []
    with pytest.raises(APIError, match="worker cpu:1 lost: hung") as caught:
        async for chunk in stream:
            got.append(chunk)
    assert len(got) >= 2
    assert caught.value.code == "worker_lost"
    assert not engine.live


async def test_an_unforeseen_error_within_a_stream_shows_no_detail(client: Client) -> None:
    engine = FakeEngine(fail_after=(2, KeyError("secret")))
    stream = await client(engine).chat.completions.create(model=MODEL, messages=USER, stream=True)
    with pytest.raises(APIError) as caught:
        _ = [c async for c in stream]
    assert caught.value.code == "internal_error"
    assert "secret" not in caught.value.message


async def test_special_tokens_in_the_answer(client: Client) -> None:
    engine = FakeEngine(lambda r: [*ids("a"), 0, *ids("b")])
    chat = client(engine).chat.completions.create
    shown = await chat(model=MODEL, messages=USER, extra_body={"skip_special_tokens": False})
    assert shown.choices[0].message.content == "a<|im_start|>b"
    assert (await chat(model=MODEL, messages=USER)).choices[0].message.content == "ab"
    assert len(ids("a")) == 1
