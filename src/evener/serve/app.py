"""The ASGI application: every endpoint over one engine."""

import asyncio
import hmac
import re
import secrets
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from evener.errors import Unauthorized, Unavailable
from evener.execute.base import Engine
from evener.serve import chat, completions, errors, health, ledger, metrics, models, served, tokenize
from evener.serve.front import VERSION, Front, FrontConfig
from evener.serve.metrics import Metrics
from evener.serve.vocabulary import Tokenizer
from evener.serve.wire import components

OPEN_PATHS = frozenset({"/health"})
"""Paths that need no API key."""
_REQUEST_ID = re.compile(rb"[!-~]{1,128}")
"""A client's own x-request-id that is sent back."""


def create_app(engine: Engine, tokenizer: Tokenizer, config: FrontConfig) -> FastAPI:
    """The front over a running engine, which stays the caller's to close.

    Raises UnsupportedModel for a tokenizer that is not understood.
    """
    front = Front(engine, tokenizer, config)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        yield
        front.close()

    # The interactive pages load scripts from the network; the document itself stays.
    app = FastAPI(title="Evener", version=VERSION, lifespan=lifespan, docs_url=None, redoc_url=None)
    errors.install(app)
    for room in (completions, chat, models, tokenize, health, ledger, served):
        app.include_router(room.router(front))
    app.include_router(metrics.router(front.metrics))
    app.add_middleware(Gate, api_key=config.api_key, metrics=front.metrics)
    if config.allowed_origins:  # outside the gate: a browser's preflight carries no key
        app.add_middleware(
            CORSMiddleware, allow_origins=config.allowed_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
            schema.setdefault("components", {}).setdefault("schemas", {}).update(components())
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
    return app


class Gate:
    """Asks for the API key before anything of the request is read; names and counts every answer.

    The header `x-request-id` (OpenAI's client shows it as `_request_id`) is the client's own, or else the id that the
    answer's `id` ends with.
    """

    def __init__(self, app: ASGIApp, api_key: str | None, metrics: Metrics) -> None:
        self._app = app
        self._key = api_key.encode() if api_key is not None else None
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI side."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        started = False
        made = scope.setdefault("state", {})["id"] = secrets.token_hex(12)
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else made.encode()

        async def counted(message: Message) -> None:
            nonlocal started
            started = True
            if message["type"] == "http.response.start":
                route = scope.get("route")
                self._metrics.answered(getattr(route, "path", "other"), message["status"])
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
            await send(message)

        if self._key is not None and scope["path"] not in OPEN_PATHS and not self._authorised(scope):
            refusal = Unauthorized("the API key is missing or wrong; send 'Authorization: Bearer KEY'")
            await errors.error_response(refusal)(scope, receive, counted)
            return
        try:
            await self._app(scope, receive, counted)
        except asyncio.CancelledError:
            # The server stops and this request has outlived the grace period. A stream just breaks off.
            if not started:
                stopping = Unavailable("the server is stopping; send the request again when it is back")
                await errors.error_response(stopping)(scope, receive, counted)

    def _authorised(self, scope: Scope) -> bool:
        given = dict(scope["headers"]).get(b"authorization", b"")
        scheme, _, key = given.partition(b" ")
        # Compared in constant time, so that the key cannot be guessed byte by byte.
        return bool(
            scheme.lower() == b"bearer" and self._key is not None and hmac.compare_digest(key.strip(), self._key)
        )
