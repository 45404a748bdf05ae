"""A real server on a loopback port: clients that leave, a clean stop, a port in use."""

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

import pytest
from fake import EOS, MODEL, FakeEngine, tiny_tokenizer
from openai import APIConnectionError, APIStatusError, AsyncOpenAI

from evener.errors import StartFailed
from evener.serve.app import create_app
from evener.serve.front import FrontConfig
from evener.serve.listen import bind
from evener.serve.server import run

pytestmark = pytest.mark.anyio


@asynccontextmanager
async def serving(
    engine: FakeEngine, grace_s: int = 5, listener: socket.socket | None = None
) -> AsyncIterator[tuple[int, asyncio.Event]]:
    """The port, and the event that stops the server."""
    config = FrontConfig(served_model_names=(MODEL,), eos_token_ids=(EOS,))
    app = create_app(engine, tiny_tokenizer(), config)
    port: asyncio.Future[int] = asyncio.get_running_loop().create_future()
    stop = asyncio.Event()
    task = asyncio.create_task(run(app, port=0, ready=port.set_result, stop=stop, grace_s=grace_s, listener=listener))
    try:
        yield await asyncio.wait_for(port, 10), stop
    finally:
        stop.set()
        await asyncio.wait_for(task, 10)


def api(port: int) -> AsyncOpenAI:
    return AsyncOpenAI(api_key="none", base_url=f"http://127.0.0.1:{port}/v1", max_retries=0)


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(500):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it never came true")


async def test_streams_as_it_goes_and_answers_in_full() -> None:
    engine = FakeEngine(delay_s=0.01)
    async with serving(engine) as (port, _), api(port) as client:
        stream = await client.completions.create(model=MODEL, prompt="hi", max_tokens=40, stream=True)
        seen_live = False
        async for _ in stream:
            seen_live |= bool(engine.live)
        assert seen_live, "the first chunk came before the last token"
        done = await client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
        assert done.choices[0].message.content == " hello to the fox"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("n", [1, 3])
async def test_a_client_that_leaves_frees_its_kv(stream: bool, n: int) -> None:
    engine = FakeEngine("fox " * 1000, delay_s=0.02)
    async with serving(engine) as (port, _), api(port) as client:
        task = asyncio.create_task(
            client.completions.create(model=MODEL, prompt="hi", max_tokens=200, stream=stream, n=n)
        )
        if stream:
            started = await task
            await anext(aiter(started))
            assert len(engine.live) == n
            await started.close()
        else:
            await until(lambda: len(engine.live) == n)
            task.cancel()
        await until(lambda: not engine.live)
        assert len(engine.cancelled) == n


async def test_a_client_that_leaves_before_the_first_token() -> None:
    engine = FakeEngine(delay_s=60)
    async with serving(engine) as (port, _), api(port) as client:
        task = asyncio.create_task(client.completions.create(model=MODEL, prompt="hi", stream=True))
        await until(lambda: bool(engine.live))
        task.cancel()
        await until(lambda: not engine.live)


async def test_a_stop_finishes_what_was_accepted() -> None:
    engine = FakeEngine(delay_s=0.02)
    async with serving(engine) as (port, stop), api(port) as client:
        task = asyncio.create_task(client.completions.create(model=MODEL, prompt="hi", max_tokens=20))
        await until(lambda: bool(engine.live))
        stop.set()
        assert (await task).choices[0].finish_reason == "stop"


async def test_a_stop_ends_what_does_not_finish_in_time() -> None:
    engine = FakeEngine(delay_s=60)
    async with serving(engine, grace_s=0) as (port, stop), api(port) as client:
        task = asyncio.create_task(client.completions.create(model=MODEL, prompt="hi"))
        await until(lambda: bool(engine.live))
        stop.set()
        await until(lambda: not engine.live)
        with pytest.raises(APIStatusError, match="the server is stopping") as caught:
            await task
        assert caught.value.status_code == 503


async def test_a_second_signal_cancels_and_leaves_no_task_behind() -> None:
    before = asyncio.all_tasks()
    engine = FakeEngine(delay_s=60)
    async with serving(engine, grace_s=60) as (port, _), api(port) as client:
        task = asyncio.create_task(client.completions.create(model=MODEL, prompt="hi"))
        await until(lambda: bool(engine.live))
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises((APIConnectionError, APIStatusError)):
            await asyncio.wait_for(task, 10)
    await until(lambda: not engine.live and asyncio.all_tasks() == before)


async def test_a_stop_breaks_off_a_stream_that_does_not_finish_in_time() -> None:
    engine = FakeEngine("fox " * 1000, delay_s=0.05)
    async with serving(engine, grace_s=0) as (port, stop), api(port) as client:
        stream = await client.completions.create(model=MODEL, prompt="hi", max_tokens=200, stream=True)
        await anext(aiter(stream))
        stop.set()
        with pytest.raises(APIConnectionError):
            async for _ in stream:
                pass
        assert not engine.live


async def test_the_port_is_claimed_before_anybody_is_let_in() -> None:
    listener = bind("127.0.0.1", 0)
    port = listener.getsockname()[1]
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    async with serving(FakeEngine(), listener=listener) as (served, _):
        assert served == port
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.close()


async def test_port_in_use_is_named_with_the_remedy() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(StartFailed, match=rf"127.0.0.1:{port} .*in use.*--port"):
            await run(never_asked, port=port)
    with pytest.raises(StartFailed, match=r"70000 is not between 0 and 65535.*--port"):
        await run(never_asked, port=70_000)
    with pytest.raises(StartFailed, match=r"no such address.*--host"):
        await run(never_asked, "203.0.113.1", 0)


async def never_asked(scope: object, receive: object, send: object) -> None:
    """An app behind a port that cannot be had."""
    raise AssertionError("the server must not have started")
