"""The client against a real server on loopback that misbehaves in every way it must survive."""

import asyncio
import socket
from collections.abc import AsyncIterator

import numpy as np
import pytest
from scripted_server import Script, free_port, serving

from evener.engine.events import Answer
from evener.engine.request import Request
from evener.errors import InvalidInput, Overloaded, Unavailable, UnknownModel
from evener.workload import drive
from evener.workload.client import CompletionsClient, Served, ask_served, open_session
from evener.workload.drive import Clock, Record, Run, SendFailed
from evener.workload.lengths import Fixed
from evener.workload.offline import EngineClient
from evener.workload.report import make_report
from evener.workload.requests import TimedRequest, TokenIds, build_requests


def made(n: int, gap_s: float = 0.0, tokens: int = 4) -> list[TimedRequest]:
    return build_requests(np.arange(float(n)) * gap_s, Fixed(6), Fixed(tokens), TokenIds(), 0)


def load(
    script: Script, requests: list[TimedRequest], concurrency: int | None = None, timeout_s: float = 20.0, key: str = ""
) -> Run:
    """Run the requests against a scripted server."""

    async def measure(url: str) -> Run:
        run = drive.new_run(requests, open_loop=concurrency is None)
        async with open_session(key or None) as session:
            client = CompletionsClient(session, url, "tiny", ignore_eos=True, temperature=0.0, timeout_s=timeout_s)
            if concurrency is None:
                await drive.open_loop(requests, client.send, run)
            else:
                await drive.closed_loop(requests, concurrency, client.send, run)
        return run

    with serving(script) as url:
        return asyncio.run(measure(url))


def test_a_good_run() -> None:
    script = Script(first_s=0.05, gap_s=0.02)
    run = load(script, made(5, gap_s=0.01))
    report = make_report(run)
    assert (report.completed, report.failed, report.short_outputs) == (5, 0, 0)
    assert (report.input_tokens, report.output_tokens, report.tokens_per_chunk) == (30, 20, 1.0)
    body = script.bodies[0]
    assert body["prompt"] == made(5)[0].prompt
    assert body["stream"] and body["ignore_eos"] and body["stream_options"] == {"include_usage": True}
    assert (body["max_tokens"], body["temperature"]) == (4, 0.0)
    for r in run.records:
        assert r.chunk_s == sorted(r.chunk_s) and len(r.chunk_s) == 4
        assert r.scheduled_s <= r.sent_s <= r.chunk_s[0] <= r.chunk_s[-1] <= r.ended_s <= run.duration_s
        # the server waits at least so long; how much longer is up to the machine
        assert r.chunk_s[0] - r.scheduled_s >= 0.05
        assert r.chunk_s[-1] - r.chunk_s[0] >= 3 * 0.02 - 0.01
    assert run.client_cpu_s > 0


@pytest.mark.parametrize(
    ("mode", "reason", "detail"),
    [
        ("429", "http_429", "scripted 429"),
        ("500", "http_500", "scripted 500"),
        ("cut", "broken_stream", "without [DONE]"),
        ("reset", "broken_stream", ""),
        ("error", "server_error", "worker cpu:1 lost"),
        ("garbage", "bad_sse", "surprise"),
        ("not_json", "bad_sse", ""),
        ("wrong_type", "bad_sse", ""),
        ("endless_line", "bad_sse", "more than 1048576 bytes"),
        ("no_usage", "no_usage", "include_usage"),
        ("silent", "no_tokens", ""),
    ],
)
def test_every_failure_is_counted_by_its_reason(mode: str, reason: str, detail: str) -> None:
    report = make_report(load(Script(modes=["ok", mode, "ok"]), made(3), concurrency=1))
    assert (report.completed, report.failed) == (2, 1)
    assert report.failures == {reason: 1}
    assert detail in report.failure_examples[reason]
    assert report.output_tokens == 8


def test_timeouts_end_a_request_and_free_its_connection() -> None:
    script = Script(modes=["hang", "ok"])
    report = make_report(load(script, made(2), concurrency=1, timeout_s=0.5))
    assert report.failures == {"timeout": 1}
    assert report.completed == 1


def test_nobody_listens() -> None:
    async def measure() -> Run:
        run = drive.new_run(made(2), open_loop=True)
        async with open_session() as session:
            url = f"http://127.0.0.1:{free_port()}"
            await drive.open_loop(made(2), CompletionsClient(session, url, "m", True, 0.0, 5.0).send, run)
            with pytest.raises(Unavailable, match="no server at"):
                await ask_served(session, url, None)
        return run

    assert make_report(asyncio.run(measure())).failures == {"connect": 2}


def test_a_server_that_hangs_up_at_once() -> None:
    async def measure() -> Run:
        run = drive.new_run(made(1), open_loop=True)
        server = await asyncio.start_server(
            lambda reader, writer: writer.close(), "127.0.0.1", 0, family=socket.AF_INET
        )
        port = server.sockets[0].getsockname()[1]
        async with server, open_session() as session:
            client = CompletionsClient(session, f"http://127.0.0.1:{port}", "m", True, 0.0, 5.0)
            await drive.open_loop(made(1), client.send, run)
        return run

    assert make_report(asyncio.run(measure())).failures == {"broken_stream": 1}


def test_a_server_that_closes_connections_it_said_to_keep() -> None:
    """llama.cpp's does so after a stream: a second request on one of its connections gets no answer."""
    events = (
        b'data: {"choices": [{"text": "a", "finish_reason": "length"}]}\n\n'
        b'data: {"choices": [], "usage": {"prompt_tokens": 6, "completion_tokens": 1}}\n\n'
        b"data: [DONE]\n\n"
    )
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: keep-alive\r\nContent-Length: %d\r\n\r\n"

    async def answer_once(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        said = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line.split(b":")[1]) for line in said.splitlines() if line.lower().startswith(b"content-len"))
        await reader.readexactly(length)
        writer.write(head % len(events) + events)
        await writer.drain()
        await reader.read(1)  # the next request, or the end of the connection
        writer.close()

    async def measure() -> Run:
        run = drive.new_run(made(3, tokens=1), open_loop=False)
        server = await asyncio.start_server(answer_once, "127.0.0.1", 0, family=socket.AF_INET)
        port = server.sockets[0].getsockname()[1]
        async with server, open_session() as session:
            client = CompletionsClient(session, f"http://127.0.0.1:{port}", "m", True, 0.0, 5.0)
            await drive.closed_loop(made(3, tokens=1), 1, client.send, run)
        return run

    report = make_report(asyncio.run(measure()))
    assert (report.completed, report.failures) == (3, {})


def test_short_answers_and_joined_tokens_show() -> None:
    report = make_report(load(Script(modes=["short", "joined"]), made(2), concurrency=1))
    assert (report.completed, report.short_outputs, report.output_tokens) == (2, 1, 7)
    assert report.tokens_per_chunk == pytest.approx(7 / 5)


def test_a_closing_chunk_is_no_token() -> None:
    run = load(Script(modes=["closing"]), made(1))
    assert len(run.records[0].chunk_s) == run.records[0].output_tokens == 4


def test_closed_loop_keeps_its_concurrency() -> None:
    script = Script(gap_s=0.01)
    run = load(script, made(9), concurrency=3)
    assert script.most_running == 3
    assert make_report(run).completed == 9
    assert [r.scheduled_s for r in run.records] == sorted(r.scheduled_s for r in run.records)


def test_open_loop_does_not_wait_for_answers() -> None:
    script = Script(first_s=0.6)
    run = load(script, made(8, gap_s=0.01))
    assert script.most_running == 8
    assert [r.scheduled_s for r in run.records] == pytest.approx([0.01 * k for k in range(8)])


def test_api_key() -> None:
    assert make_report(load(Script(api_key="s3"), made(1))).failures == {"http_401": 1}
    assert make_report(load(Script(api_key="s3"), made(1), key="s3")).completed == 1


def test_what_a_server_serves() -> None:
    async def ask(url: str, model: str | None) -> Served:
        async with open_session() as session:
            return await ask_served(session, url, model)

    with serving(Script(max_model_len=777)) as url:
        assert asyncio.run(ask(url, None)) == Served("tiny", 777)
        assert asyncio.run(ask(url, "tiny")).model == "tiny"
        with pytest.raises(UnknownModel, match="it serves: tiny"):
            asyncio.run(ask(url, "huge"))
        with pytest.raises(Unavailable, match="404"):
            asyncio.run(ask(url + "/elsewhere", None))
    with serving(Script(max_model_len=None)) as url:
        assert asyncio.run(ask(url, None)).max_model_len is None


def test_an_interrupted_run_still_accounts_for_every_request() -> None:
    async def measure(url: str) -> Run:
        requests = made(6)
        run = drive.new_run(requests, open_loop=False)
        async with open_session() as session:
            client = CompletionsClient(session, url, "tiny", True, 0.0, 20.0)
            loop = asyncio.create_task(drive.closed_loop(requests, 1, client.send, run))
            while sum(r.failure is None for r in run.records) < 2:
                await asyncio.sleep(0.005)
            loop.cancel()
            with pytest.raises(asyncio.CancelledError):
                await loop
        return run

    with serving(Script(modes=["ok", "ok", "hang"])) as url:
        report = make_report(asyncio.run(measure(url)))
    assert report.completed == 2 and report.failures == {"unfinished": 4}
    assert report.duration_s > 0


def test_a_fault_of_the_client_is_counted_too() -> None:
    async def send(request: TimedRequest, record: Record, now: Clock) -> None:
        raise KeyError("oops")

    run = drive.new_run(made(2), open_loop=True)
    seen: list[int] = []
    asyncio.run(drive.open_loop(made(2), send, run, lambda record: seen.append(record.index)))
    assert make_report(run).failures == {"client_error": 2}
    assert sorted(seen) == [0, 1]
    with pytest.raises(InvalidInput, match="concurrency 0"):
        asyncio.run(drive.closed_loop(made(1), 0, send, drive.new_run(made(1), open_loop=False)))


class FakeEngine:
    """Answers one token at a time, two with the last; behaves as the request's cap says."""

    def __init__(self) -> None:
        self.asked: list[Request] = []
        self.closed: list[str] = []

    async def submit(self, request: Request) -> AsyncIterator[Answer]:
        self.asked.append(request)
        if request.max_tokens == 99:
            raise Overloaded("the queue is full")
        try:
            for _ in range(request.max_tokens - 2):
                await asyncio.sleep(60 if request.max_tokens == 50 else 0)
                yield Answer(request.request_id, [1], 1)
            yield Answer(request.request_id, [1, 1], 2, finish="cancelled" if request.max_tokens == 7 else "length")
        finally:
            self.closed.append(request.request_id)


def test_offline_counts_as_online_does() -> None:
    engine = FakeEngine()

    async def measure(tokens: int) -> Run:
        requests = made(2, tokens=tokens)
        run = drive.new_run(requests, open_loop=False)
        client = EngineClient(engine, timeout_s=0.2)  # type: ignore[arg-type]
        await drive.closed_loop(requests, 2, client.send, run)
        return run

    report = make_report(asyncio.run(measure(4)))
    assert (report.completed, report.output_tokens, report.input_tokens) == (2, 8, 12)
    assert report.tokens_per_chunk == pytest.approx(4 / 3)
    asked = engine.asked[0]
    assert (asked.prompt, asked.prompt_len, asked.stop_token_ids) == (made(1)[0].prompt, 6, ())
    assert make_report(asyncio.run(measure(99))).failures == {"overloaded": 2}
    assert make_report(asyncio.run(measure(7))).failures == {"cancelled": 2}
    assert make_report(asyncio.run(measure(50))).failures == {"timeout": 2}
    assert len({r.request_id for r in engine.asked}) == 8
    assert len(engine.closed) == 6, "an answer iterator was left open"


def test_offline_takes_token_ids_only() -> None:
    async def send() -> None:
        request = TimedRequest(0, 0.0, "words", 1, 1)
        await EngineClient(FakeEngine(), 1.0).send(request, Record(0, 1, 0.0), lambda: 0.0)  # type: ignore[arg-type]

    with pytest.raises(InvalidInput, match="token ids"):
        asyncio.run(send())


def test_details_of_failures_are_kept_short() -> None:
    assert len(SendFailed("http_500", "x" * 10_000).detail) == 500
