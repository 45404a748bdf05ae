"""A small completions server on a loopback port whose behaviour is chosen per request, to test the client against."""

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse


@dataclass
class Script:
    """How the server behaves. `modes[k]` is for the k-th request that arrives, the last one for all further."""

    modes: list[str] = field(default_factory=lambda: ["ok"])
    first_s: float = 0.0
    gap_s: float = 0.0
    max_model_len: int | None = 4096
    api_key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    running: int = 0
    most_running: int = 0


def sse(value: Any) -> bytes:
    return b"data: " + json.dumps(value).encode() + b"\n\n"


def piece(text: str, finish: str | None = None) -> bytes:
    return sse({"id": "cmpl-1", "choices": [{"index": 0, "text": text, "finish_reason": finish}], "usage": None})


async def stream(script: Script, mode: str, body: dict[str, Any]) -> AsyncIterator[bytes]:
    script.running += 1
    script.most_running = max(script.most_running, script.running)
    try:
        n = body["max_tokens"] if mode != "short" else body["max_tokens"] - 1
        if mode == "hang":
            await asyncio.sleep(60)
        if mode == "garbage":
            yield b"<html>surprise</html>\n\n"
        if mode == "not_json":
            yield b"data: {oops\n\n"
        if mode == "wrong_type":
            yield sse({"choices": 7})
        if mode == "endless_line":
            yield b"data: " + b"x" * 5_000_000
        await asyncio.sleep(script.first_s)
        if mode == "joined":
            yield piece("a b c ")
            await asyncio.sleep(script.gap_s)
            yield piece("d", "length")
        else:
            for k in range(n if mode != "silent" else 0):
                if mode in ("cut", "reset", "error") and k == 2:
                    break
                yield b": ping\n\n" + piece("" if k % 2 else "word ")
                await asyncio.sleep(script.gap_s)
        if mode == "cut":
            return
        if mode == "reset":
            raise ConnectionError("the scripted server drops the connection")
        if mode == "error":
            yield sse({"error": {"message": "worker cpu:1 lost", "type": "server_error"}})
        if mode == "closing":
            yield piece("", "length")
        if mode != "no_usage":
            yield sse({"choices": [], "usage": {"prompt_tokens": len(body["prompt"]), "completion_tokens": n}})
        yield b"data: [DONE]\n\n"
    finally:
        script.running -= 1


def make_app(script: Script) -> FastAPI:
    app = FastAPI()

    @app.get("/v1/models")
    async def models() -> Any:
        return {"object": "list", "data": [{"id": "tiny", "object": "model", "max_model_len": script.max_model_len}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.json()
        script.bodies.append(body)
        mode = script.modes[min(len(script.bodies), len(script.modes)) - 1]
        if script.api_key and request.headers.get("authorization") != f"Bearer {script.api_key}":
            return JSONResponse({"error": {"message": "wrong key"}}, 401)
        if mode.isdecimal():
            return JSONResponse({"error": {"message": f"scripted {mode}"}}, int(mode))
        return StreamingResponse(stream(script, mode, body), media_type="text/event-stream")

    return app


@contextmanager
def serving(script: Script) -> Iterator[str]:
    """Serve `script` in a thread; yields the URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen(100)  # connections wait here until the server is up
        config = uvicorn.Config(make_app(script), log_level="critical", timeout_graceful_shutdown=1)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, args=([sock],), daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the scripted server does not stop"


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])
