"""From engine answers to text: the choices of one client request, run together and closed together."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Hashable
from contextlib import aclosing
from typing import NamedTuple, TypeVar

from evener.engine.batch import TokenLogprobs
from evener.engine.events import Answer
from evener.engine.request import Request
from evener.errors import Unavailable
from evener.execute.base import Engine
from evener.serve.detokenize import Detokenizer
from evener.serve.metrics import Metrics

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class TokenText(NamedTuple):
    """One output token with its logprobs; `offset` is the character of the choice's text where it begins."""

    offset: int
    logprobs: TokenLogprobs


class Delta(NamedTuple):
    """What one choice gained."""

    choice: int
    text: str
    tokens: list[TokenText]
    """Only where logprobs were asked for."""
    finish: str | None
    """`stop` or `length` with the last delta."""
    stop_reason: int | str | None
    """The stop string or the client's stop token that ended it."""
    prompt_logprobs: list[TokenLogprobs] | None
    """Entry k belongs to prompt token k + 1."""


class Choice:
    """One sequence of a client request: counts its tokens and makes its text."""

    def __init__(
        self,
        index: int,
        request: Request,
        detokenizer: Detokenizer,
        *,
        client_stop_ids: frozenset[int] = frozenset(),
        include_stop: bool = False,
    ) -> None:
        self.index = index
        self.request = request
        self.n_tokens = 0
        """Output tokens, a stop token included."""
        self.cached_tokens = 0
        self.done = False
        self.stopped = False
        """A stop string ended it, before the engine knew."""
        self._detokenizer = detokenizer
        self._client_stop_ids = client_stop_ids
        self._include_stop = include_stop
        self._pending: list[tuple[int, TokenText]] = []

    def take(self, answer: Answer) -> Delta | None:
        """Add an answer; None while nothing can be shown yet. Raises Unavailable if the engine gave up."""
        if answer.finish == "cancelled":
            raise Unavailable("the server cancelled the request; send it again")
        self.cached_tokens = max(self.cached_tokens, answer.cached_tokens)
        text, finish = self._add_tokens(answer), answer.finish
        stop_reason: int | str | None = None
        if finish is not None and self._detokenizer.stop is None:
            if answer.stop_token is not None:
                self.n_tokens += 1
                if answer.stop_token in self._client_stop_ids:
                    stop_reason = answer.stop_token
                    text += self._detokenizer.feed(answer.stop_token) if self._include_stop else ""
            text += self._detokenizer.finish()
        if self._detokenizer.stop is not None:
            self.stopped = finish is None
            finish, stop_reason = "stop", self._detokenizer.stop
        self.done = finish is not None
        tokens = self._shown_tokens()
        if not (text or tokens or finish or answer.prompt_logprobs):
            return None
        return Delta(self.index, text, tokens, finish, stop_reason, answer.prompt_logprobs)

    def _add_tokens(self, answer: Answer) -> str:
        text = ""
        for k, token in enumerate(answer.tokens):
            offset = self._detokenizer.decoded
            text += self._detokenizer.feed(token)
            self.n_tokens += 1
            if answer.logprobs is not None:
                self._pending.append((self._detokenizer.decoded, TokenText(offset, answer.logprobs[k])))
            if self._detokenizer.stop is not None:
                break
        return text

    def _shown_tokens(self) -> list[TokenText]:
        """Tokens whose whole text is out; at the end, those of which any is (all, without a stop string)."""
        emitted = self._detokenizer.emitted
        if not self.done:
            cut = next((k for k, (end, _) in enumerate(self._pending) if end > emitted), len(self._pending))
        elif self._detokenizer.stop is None:
            cut = len(self._pending)
        else:
            cut = next((k for k, (_, t) in enumerate(self._pending) if t.offset >= emitted), len(self._pending))
        shown, self._pending = [t for _, t in self._pending[:cut]], self._pending[cut:]
        return shown


class Generation:
    """The choices of one client request, in flight."""

    def __init__(self, engine: Engine, metrics: Metrics, choices: list[Choice], arrived: float) -> None:
        """`arrived`: `time.perf_counter()` when the client's request came in."""
        self.choices = choices
        self._engine = engine
        self._metrics = metrics
        self._arrived = arrived

    async def deltas(self) -> AsyncGenerator[Delta, None]:
        """Everything the choices gain, until all have ended.

        Closing it early cancels what still runs, so that its KV is freed at once. Raises the engine's errors;
        then no choice goes on.
        """
        # Submitted in order: the later choices of a prompt may find the first one's prefix in the cache.
        streams = {choice.index: self._engine.submit(choice.request) for choice in self.choices}
        timers = {choice.index: self._metrics.timer(self._arrived) for choice in self.choices}
        running = len(self.choices)
        try:
            async with aclosing(merge(streams)) as answers:
                async for index, answer in answers:
                    choice = self.choices[index]
                    if choice.done:
                        continue
                    delta = choice.take(answer)
                    timers[index].tokens(answer.count)
                    if choice.stopped:
                        self._engine.cancel(choice.request.request_id, stopped=True)
                    if delta is not None:
                        yield delta
                    if choice.done:
                        assert delta is not None and delta.finish is not None
                        timers[index].finished(delta.finish)
                        running -= 1
                        if not running:
                            return
            raise Unavailable("the engine ended a request without a result; send it again")
        finally:
            for choice in self.choices:
                if not choice.done:
                    self._engine.cancel(choice.request.request_id)
                    timers[choice.index].finished("abort")
            for stream in streams.values():
                if isinstance(stream, AsyncGenerator):
                    await stream.aclose()


async def merge(streams: dict[K, AsyncIterator[V]]) -> AsyncGenerator[tuple[K, V], None]:
    """Items of several streams as they come, with the stream's key. The first error of any ends all."""
    if len(streams) == 1:
        [(key, only)] = streams.items()
        async for item in only:
            yield key, item
        return
    queue: asyncio.Queue[tuple[K, V] | Exception | None] = asyncio.Queue()

    async def pump(key: K, stream: AsyncIterator[V]) -> None:
        try:
            async for item in stream:
                queue.put_nowait((key, item))
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)

    tasks = [asyncio.create_task(pump(key, stream)) for key, stream in streams.items()]
    try:
        ended = 0
        while ended < len(tasks):
            got = await queue.get()
            if isinstance(got, Exception):
                raise got
            if got is None:
                ended += 1
            else:
                yield got
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
