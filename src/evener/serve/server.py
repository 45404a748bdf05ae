"""Runs an ASGI app on a port until told to stop, and leaves nothing half done."""

import asyncio
import contextlib
import signal
import socket
from collections.abc import Callable, Generator

import uvicorn
from starlette.types import ASGIApp

from evener.errors import StartFailed
from evener.serve.listen import bind

GRACE_S = 30
"""Seconds that accepted requests get to finish after a stop."""


async def run(
    app: ASGIApp,
    host: str = "127.0.0.1",
    port: int = 8000,
    *,
    listener: socket.socket | None = None,
    ready: Callable[[int], None] | None = None,
    stop: asyncio.Event | None = None,
    grace_s: int = GRACE_S,
) -> None:
    """Serve on `host:port`, or on a socket from `bind`, until `stop` is set, SIGINT or SIGTERM comes.

    Then nothing more is accepted, and what was accepted is finished; what still runs after `grace_s`, or at a
    second signal, is cancelled. `ready` is called once with the port (0 picks a free one) when connections are
    taken. Returns normally in every case, so that the caller can close the engine. Raises StartFailed when the
    address cannot be had.
    """
    listener = listener or bind(host, port)
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, server_header=False, timeout_graceful_shutdown=grace_s
    )
    server = _Server(config)
    loop = asyncio.get_running_loop()
    handled = []
    for number in (signal.SIGINT, signal.SIGTERM):
        with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: its owner handles signals
            loop.add_signal_handler(number, server.handle_exit, number, None)
            handled.append(number)
    watcher = asyncio.create_task(_watch(server, listener.getsockname()[1], ready, stop))
    try:
        await server.serve(sockets=[listener])
    except OSError as error:  # another process bound the same address in between, and listens
        raise StartFailed(f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port") from error
    finally:
        watcher.cancel()
        await asyncio.gather(watcher, return_exceptions=True)
        for number in handled:
            loop.remove_signal_handler(number)
        listener.close()


class _Server(uvicorn.Server):
    """uvicorn raises a caught signal again after its shutdown, which would end the process before the engine."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        await super().shutdown(sockets)
        if self.force_exit:  # uvicorn would leave it all to the end of the loop: the requests, and a traceback
            for task in self.server_state.tasks:
                task.cancel()
            await self.lifespan.shutdown()


async def _watch(server: _Server, port: int, ready: Callable[[int], None] | None, stop: asyncio.Event | None) -> None:
    while not server.started:
        await asyncio.sleep(0.01)
    if ready is not None:
        ready(port)
    if stop is not None:
        await stop.wait()
        server.should_exit = True
