"""The HTTP load client: streams /v1/completions of any OpenAI-compatible server.

aiohttp, because the client shares the machine with the server it measures: per streamed chunk it costs a third of
the CPU time of httpx (about 55 against 160 to 190 microseconds on a Zen 3 core).

Failures and their names: `connect`, `timeout`, `http_<status>`, `server_error` (an error inside the stream),
`bad_sse` (not the format of server-sent events, or not the JSON of a completion), `broken_stream` (ended before
`[DONE]`), `no_usage` (tokens cannot be counted), `no_tokens`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import msgspec
from aiohttp.http_exceptions import HttpProcessingError
from msgspec import Struct

from evener.errors import Unavailable, UnknownModel
from evener.workload.drive import Clock, Record, SendFailed
from evener.workload.requests import TimedRequest

MAX_LINE = 2**20
"""Bytes of one line of a stream, at most."""


class _Usage(Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Choice(Struct):
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(Struct):
    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode


class CompletionsClient:
    """Sends requests to one server; use `async with connect(...)`. Called from one event loop."""

    def __init__(
        self,
        session: aiohttp.ClientSession,
        url: str,
        model: str,
        ignore_eos: bool,
        temperature: float,
        timeout_s: float,
    ) -> None:
        self._session = session
        self._url = f"{url}/v1/completions"
        self._timeout_s = timeout_s
        self._fields = {
            "model": model,
            "temperature": temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
            # not an OpenAI field: a server that does not know it may refuse it, so it is sent only when it is meant
            **({"ignore_eos": True} if ignore_eos else {}),
        }

    async def send(self, request: TimedRequest, record: Record, now: Clock) -> None:
        """Send one request and read its stream to the end (a `Send` of the drive loops)."""
        body = msgspec.json.encode({**self._fields, "prompt": request.prompt, "max_tokens": request.output_tokens})
        try:
            async with asyncio.timeout(self._timeout_s), self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    raise SendFailed(f"http_{response.status}", await response.text(errors="replace"))
                await _read(response.content, record, now)
        except TimeoutError as error:
            raise SendFailed("timeout", f"not done after {self._timeout_s:g} s") from error
        except aiohttp.ClientConnectorError as error:
            raise SendFailed("connect", f"no server answers at {self._url}: {error.os_error}") from error
        except (aiohttp.ClientError, ConnectionError) as error:
            raise SendFailed("broken_stream", f"{type(error).__name__}: {error}") from error


async def _read(stream: aiohttp.StreamReader, record: Record, now: Clock) -> None:
    """Read server-sent events up to `[DONE]` into `record`.

    Every chunk with a choice counts as a piece of the answer, with or without text (the text of a token may be
    empty), as in vLLM's benchmark. A closing chunk that only says why it ended is no token: it is taken back when
    there would otherwise be more pieces than tokens.
    """
    usage: _Usage | None = None
    closing = False
    done = False
    try:
        async for line in stream:
            at = now()
            line = line.strip()
            if not line or line.startswith((b":", b"event:", b"id:", b"retry:")):
                continue
            if not line.startswith(b"data:"):
                raise SendFailed("bad_sse", f"expected `data: ...`, got {line[:200]!r}")
            payload = line[5:].strip()
            if payload == b"[DONE]":
                done = True
                break
            chunk = _decode(payload)
            if chunk.error is not None:
                raise SendFailed("server_error", str(chunk.error))
            if chunk.choices:
                record.chunk_s.append(at)
                closing = chunk.choices[0].finish_reason is not None and not chunk.choices[0].text
            usage = chunk.usage or usage
    except (msgspec.DecodeError, ValueError, HttpProcessingError) as error:
        # the last two: a line longer than MAX_LINE, by the version of aiohttp
        raise SendFailed("bad_sse", str(error)) from error
    if not done:
        raise SendFailed("broken_stream", "the stream ended without [DONE]")
    if usage is None:
        raise SendFailed("no_usage", "the server ignores stream_options.include_usage")
    if closing and len(record.chunk_s) > usage.completion_tokens:
        record.chunk_s.pop()
    record.input_tokens, record.output_tokens = usage.prompt_tokens, usage.completion_tokens
    if not record.chunk_s or record.output_tokens < 1:
        raise SendFailed("no_tokens", "the answer has no token")


class Served(Struct, frozen=True):
    """What a server says it serves."""

    model: str
    max_model_len: int | None
    """Prompt plus output tokens, where the server tells."""


@asynccontextmanager
async def open_session(api_key: str | None = None) -> AsyncIterator[aiohttp.ClientSession]:
    """A session without a limit on connections: a queue inside the client would hide the server's.

    A connection carries one request, as those of many users do: some servers (llama.cpp's) close one after a stream
    without saying so, and the next request on it would fail.
    """
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=30)
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(
        headers=headers, timeout=timeout, connector=connector, read_bufsize=MAX_LINE // 2
    ) as session:
        yield session


async def ask_served(session: aiohttp.ClientSession, url: str, model: str | None) -> Served:
    """The model that `url` serves: the named one, or its first.

    Raises Unavailable when the server does not answer as expected, UnknownModel when it does not serve `model`.
    """
    try:
        async with session.get(f"{url}/v1/models", timeout=aiohttp.ClientTimeout(total=30)) as response:
            body = await response.read()
            if response.status != 200:
                raise Unavailable(f"{url}/v1/models answers {response.status}: {body[:200].decode(errors='replace')}")
    except aiohttp.ClientConnectorError as error:  # whose own words are of TLS, whatever the address
        raise Unavailable(f"no server at {url}: {error.os_error}; start one or give --url") from error
    except (TimeoutError, aiohttp.ClientError, OSError, ValueError) as error:
        raise Unavailable(f"no server at {url}: {error or type(error).__name__}; start one or give --url") from error
    try:
        models = {str(m["id"]): m for m in msgspec.json.decode(body)["data"]}
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise Unavailable(
            f"{url}/v1/models does not list models; --url must name an OpenAI-compatible server"
        ) from error
    name = model if model is not None else next(iter(models), None)
    if name is None:
        raise Unavailable(f"{url} serves no model")
    if name not in models:
        raise UnknownModel(f"{url} does not serve {name!r}; it serves: {', '.join(models)}", "model")
    limit = models[name].get("max_model_len")
    return Served(name, limit if isinstance(limit, int) else None)
