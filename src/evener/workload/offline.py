"""The same requests to an engine inside this process: no HTTP, no detokenising; otherwise like `client`."""

import asyncio
import uuid
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from importlib import import_module
from itertools import count
from typing import Any, cast

from evener.engine.request import Request, SamplingParams
from evener.errors import EvenerError, InvalidInput
from evener.execute.base import Engine
from evener.workload.drive import Clock, Record, SendFailed
from evener.workload.requests import TimedRequest


class EngineClient:
    """Submits requests to an engine. `stop_token_ids` are empty under ignore_eos."""

    def __init__(
        self, engine: Engine, timeout_s: float, temperature: float = 0.0, stop_token_ids: tuple[int, ...] = ()
    ) -> None:
        self._engine = engine
        self._timeout_s = timeout_s
        self._temperature = temperature
        self._stop = stop_token_ids
        # request ids stay unique over warm-up and several runs on one engine
        self._run = uuid.uuid4().hex[:8]
        self._sent = count()

    async def send(self, request: TimedRequest, record: Record, now: Clock) -> None:
        """Submit one request and take all its answers (a `Send` of the drive loops).

        A failure carries the `code` of the engine's error; `timeout` and `cancelled` as they say.
        """
        if isinstance(request.prompt, str):
            raise InvalidInput("an engine takes token ids, not text; leave --prompts at ids")
        asked = Request(
            request_id=f"bench-{self._run}-{next(self._sent)}",
            prompt_len=request.input_tokens,
            max_tokens=request.output_tokens,
            prompt=request.prompt,
            stop_token_ids=self._stop,
            sampling=SamplingParams(temperature=self._temperature, seed=request.index),
        )
        finish = None
        try:
            async with asyncio.timeout(self._timeout_s), aclosing(cast(Any, self._engine.submit(asked))) as answers:
                async for answer in answers:
                    if answer.count:
                        record.chunk_s.append(now())
                        record.output_tokens += answer.count
                    finish = answer.finish
        except TimeoutError as error:
            raise SendFailed("timeout", f"not done after {self._timeout_s:g} s") from error
        except EvenerError as error:
            raise SendFailed(error.code, error.message) from error
        record.input_tokens = request.input_tokens
        if finish not in ("stop", "length"):
            raise SendFailed(finish or "broken_stream", "the engine ended the request early")
        if not record.output_tokens:
            raise SendFailed("no_tokens", "the answer has no token")


@asynccontextmanager
async def open_offline_engine(**options: Any) -> AsyncIterator[Engine]:
    """Start an engine as `evener.LLM` does, and close it afterwards.

    `options` go to `evener.api.start_engine` as they are; its errors pass through.
    """
    # by name, because the public API stands above this layer and pulls in the whole live body
    start: Any = import_module("evener.api").start_engine
    engine: Engine = await start(**options)
    try:
        yield engine
    finally:
        await engine.close()
