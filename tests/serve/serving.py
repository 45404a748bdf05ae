"""A server over a fake engine, in a thread, for commands that ask one."""

import asyncio
import threading
from collections.abc import Iterator

from fake import EOS, MODEL, FakeEngine, tiny_tokenizer

from evener.serve.app import create_app
from evener.serve.front import FrontConfig
from evener.serve.server import run


def serve(engine: FakeEngine, key: str | None = None) -> Iterator[str]:
    """The URL of a server in a thread."""
    config = FrontConfig(served_model_names=(MODEL,), eos_token_ids=(EOS,), api_key=key)
    app = create_app(engine, tiny_tokenizer(), config)
    stop, up, ports = asyncio.Event(), threading.Event(), []
    loops = []

    async def main() -> None:
        loops.append(asyncio.get_running_loop())
        await run(app, port=0, stop=stop, ready=lambda port: (ports.append(port), up.set()))

    thread = threading.Thread(target=lambda: asyncio.run(main()), daemon=True)
    thread.start()
    assert up.wait(20)
    try:
        yield f"http://127.0.0.1:{ports[0]}"
    finally:
        loops[0].call_soon_threadsafe(stop.set)
        thread.join(20)
