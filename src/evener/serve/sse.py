"""Server-sent events, and noticing at once that the client has left."""

import asyncio
import logging
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any, TypeVar

import msgspec
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from evener.errors import EvenerError
from evener.serve.errors import error_body

log = logging.getLogger("evener.serve")
T = TypeVar("T")

DONE = b"data: [DONE]\n\n"
CLIENT_LEFT = 499
"""The status counted for a client that left before the answer (nginx's); nobody receives it."""


class ClientLeft(Exception):
    """The connection is gone; there is nobody to answer."""


def event(record: Any) -> bytes:
    """One event whose data is the record as JSON."""
    return b"data: " + msgspec.json.encode(record) + b"\n\n"


async def until_left(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Run `work`; when the client leaves first, cancel it, wait until it has cleaned up, and raise ClientLeft.

    The request's body must have been read: the next message can then only be the disconnect.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeft
        return task.result()
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def begin(receive: Receive, items: AsyncGenerator[T, None]) -> AsyncGenerator[T, None]:
    """Wait for the first item, so that an early failure still has its own HTTP status; then the same items.

    Raises what `items` raises before its first one, or ClientLeft.
    """
    first = await until_left(receive, anext(items))

    async def all_items() -> AsyncGenerator[T, None]:
        async with aclosing(items):
            yield first
            async for item in items:
                yield item

    return all_items()


class EventStream(Response):
    """Streams frames until they end, fail or the client leaves, and then closes their source at once.

    A failure after the headers becomes an error event, which ends the stream without `[DONE]`.
    """

    media_type = "text/event-stream"

    def __init__(self, frames: AsyncGenerator[bytes, None], source: AsyncGenerator[Any, None]) -> None:
        """`source` feeds the frames; it is closed even if no frame was ever asked for."""
        self.status_code = 200
        self.background = None
        self.body = b""
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        try:
            await until_left(receive, self._send_all(send))
        except ClientLeft:
            pass
        finally:
            await self._frames.aclose()
            await self._source.aclose()

    async def _send_all(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        try:
            async for frame in self._frames:
                await send({"type": "http.response.body", "body": frame, "more_body": True})
        except Exception as error:
            if not isinstance(error, EvenerError):
                log.exception("a stream failed")
            failed = event(error_body(error))
            await send({"type": "http.response.body", "body": failed, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})
