"""From a request's body to its answer, whole or streamed: what completions and chat do alike."""

import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from typing import Any, Generic, TypeVar

from fastapi import Request
from msgspec import UNSET, Struct, UnsetType
from starlette.responses import Response

from evener.serve.errors import json_response
from evener.serve.fields import to_record
from evener.serve.front import Front
from evener.serve.generation import Delta, Generation
from evener.serve.params import GenerationFields, check_model
from evener.serve.sse import CLIENT_LEFT, DONE, ClientLeft, EventStream, begin, event, until_left
from evener.serve.wire import Usage, usage

Body = TypeVar("Body", bound=GenerationFields)
Part = TypeVar("Part", bound=Struct)


def accept(front: Front, raw: dict[str, Any], record: type[Body]) -> Body:
    """The body as a checked record: its names, types, ranges and model. Raises InvalidRequest or UnknownModel."""
    body = to_record(raw, record)
    check_model(body.model, front.config.served_model_names)
    body.check(front.engine.model.vocab)
    return body


class Writer(ABC, Generic[Body, Part]):
    """Makes one wire format from the deltas of a generation. `Part` is a choice's share of a stream's chunk."""

    def __init__(self, front: Front, body: Body, request_id: str, generation: Generation) -> None:
        self.front = front
        self.body = body
        self.request_id = request_id
        self.generation = generation
        self.created = int(time.time())
        self.model = body.model or front.config.served_model_names[0]

    @abstractmethod
    async def whole(self) -> Struct:
        """The complete answer, choices in order."""

    @abstractmethod
    def parts(self, delta: Delta) -> Iterator[Part]:
        """What a stream says of a delta, one chunk each."""

    @abstractmethod
    def chunk(self, choices: list[Part], usage: Usage | UnsetType | None) -> Struct:
        """One event of a stream."""

    def usage(self) -> Usage:
        """Tokens so far."""
        return usage(self.generation.choices, self.body.n)

    async def collected(self) -> dict[int, list[Delta]]:
        """All deltas of each choice; at least one, the last of which says how it ended."""
        found: dict[int, list[Delta]] = {c.index: [] for c in self.generation.choices}
        async with aclosing(self.generation.deltas()) as deltas:
            async for delta in deltas:
                found[delta.choice].append(delta)
        return found

    async def frames(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream; with `include_usage` every chunk has the field, and only the last a value."""
        options = self.body.stream_options
        include = options is not None and options.include_usage
        running = options is not None and options.continuous_usage_stats
        async with aclosing(deltas):
            async for delta in deltas:
                for part in self.parts(delta):
                    yield event(self.chunk([part], self.usage() if running else None if include else UNSET))
        if include:
            yield event(self.chunk([], self.usage()))
        yield DONE

    async def respond(self, request: Request) -> Response:
        """Run the generation; a client that leaves ends it. Raises the engine's errors before the first token."""
        try:
            if not self.body.stream:
                return json_response(await until_left(request.receive, self.whole()))
            source = self.generation.deltas()
            return EventStream(self.frames(await begin(request.receive, source)), source)
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)
