"""The whole server with the official client: the default model over two devices."""

import time
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from tests.live.server import Server

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    tmp: Path = tmp_path_factory.mktemp("serve")
    with Server(None, tmp, "--devices", "cpu:0 cpu:1", "-tp", "2", "--kv-cache-memory", "64MiB") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0)


MODEL = "SmolLM2-135M-Instruct"
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


def test_chat(client: openai.OpenAI) -> None:
    reply = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
    assert "Paris" in (reply.choices[0].message.content or "")
    assert reply.choices[0].finish_reason == "stop"
    assert (
        reply.usage is not None
        and reply.usage.total_tokens == reply.usage.prompt_tokens + reply.usage.completion_tokens
    )


def test_chat_streamed_is_the_same_text(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model=MODEL, messages=QUESTION, max_tokens=16, temperature=0)
    stream = client.chat.completions.create(
        model=MODEL,
        messages=QUESTION,
        max_tokens=16,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    text, usage = "", None
    for chunk in stream:
        text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
        usage = chunk.usage or usage
    assert text == whole.choices[0].message.content
    assert usage is not None and whole.usage is not None and usage.completion_tokens == whole.usage.completion_tokens


def test_completion_with_logprobs_and_two_choices(client: openai.OpenAI) -> None:
    reply = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=12, n=2, logprobs=3, seed=11)
    assert [c.index for c in reply.choices] == [0, 1]
    assert reply.choices[0].text != reply.choices[1].text
    for choice in reply.choices:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        assert len(choice.logprobs.token_logprobs) == 12
        assert all(p is not None and p <= 0 for p in choice.logprobs.token_logprobs)
        assert "".join(choice.logprobs.tokens or []) == choice.text


def test_one_seed_twice(client: openai.OpenAI) -> None:
    def text(seed: int) -> str:
        return client.completions.create(model=MODEL, prompt="My favourite", max_tokens=24, seed=seed).choices[0].text

    assert text(5) == text(5) != text(6)


def test_stop_string(client: openai.OpenAI) -> None:
    free = client.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=24, temperature=0).choices[0].text
    stop = free[6:9]
    reply = client.completions.create(model=MODEL, prompt="1, 2, 3,", max_tokens=24, temperature=0, stop=stop)
    assert reply.choices[0].text == free[: free.index(stop)]
    assert reply.choices[0].finish_reason == "stop"


def test_a_client_that_leaves_frees_its_blocks(server: Server, client: openai.OpenAI) -> None:
    stream = client.completions.create(
        model=MODEL, prompt="Tell me all:", max_tokens=900, stream=True, extra_body={"ignore_eos": True}
    )
    for _, _chunk in zip(range(5), stream, strict=False):
        pass
    assert server.metric("evener_num_requests_running") == 1
    stream.close()
    deadline = time.monotonic() + 20
    while server.metric("evener_num_requests_running") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert server.metric("evener_num_requests_running") == 0


def test_too_many_requests_get_429_and_the_accepted_finish(tmp_path: Path, tiny: Path) -> None:
    import asyncio

    with Server(tiny, tmp_path, "--devices", "cpu:0", "--max-num-seqs", "2", "--max-queue", "3") as server:

        async def run() -> tuple[int, list[openai.RateLimitError]]:
            async with openai.AsyncOpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0) as client:
                tasks = [
                    client.completions.create(
                        model="tiny-llama", prompt="a b c", max_tokens=200, extra_body={"ignore_eos": True}
                    )
                    for _ in range(12)
                ]
                got = await asyncio.gather(*tasks, return_exceptions=True)
            done = [r for r in got if not isinstance(r, BaseException)]
            assert all(r.usage is not None and r.usage.completion_tokens == 200 for r in done)
            return len(done), [r for r in got if isinstance(r, openai.RateLimitError)]

        finished, refused = asyncio.run(run())
        assert finished + len(refused) == 12 and finished >= 3 and refused
        assert float(refused[0].response.headers["retry-after"]) >= 1
