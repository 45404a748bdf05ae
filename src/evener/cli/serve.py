"""`evener serve`: an OpenAI-compatible server."""

import asyncio
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from evener.api import EngineOptions, describe, prepare, start_engine
from evener.cli.engine_options import with_engine_options
from evener.errors import InvalidInput
from evener.execute.live.engine import LiveEngine
from evener.model.source import ModelSource
from evener.plan.load import AUTO
from evener.profile import load_profile, local_devices, measure
from evener.serve.listen import bind
from evener.spec.cluster import Cluster, parse_device


@with_engine_options
def serve(
    options: EngineOptions,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free one.")] = 8000,
    api_key: Annotated[
        str | None, typer.Option(help="Clients must send it.", envvar="EVENER_API_KEY", show_envvar=True)
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="What clients call the model. Repeatable.", show_default="the model's own")
    ] = None,
    allowed_origins: Annotated[
        list[str] | None,
        typer.Option(
            help="Web origins that may read answers (CORS), like http://localhost:3000; * for any. Repeatable.",
            show_default="none",
        ),
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="Jinja file used instead of the model's own.")] = None,
) -> None:
    """Serve a model over one or several devices with OpenAI's API."""
    template = None
    if chat_template is not None:
        try:
            template = chat_template.read_text()
        except OSError as error:
            raise InvalidInput(f"chat template {chat_template}: {error.strerror}; give a readable file") from error
    names, origins = tuple(served_model_name or ()), tuple(allowed_origins or ())
    asyncio.run(_serve(options, host, port, api_key, names, origins, template))


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _load_front(source: ModelSource) -> Any:
    """Import the HTTP front, and load the tokenizer."""
    import evener.serve.app
    import evener.serve.server  # noqa: F401

    return source.tokenizer()


def _measure(options: EngineOptions) -> None:
    """Measure the devices to choose among, unless it was done before."""
    given = tuple(parse_device(text) for text in options.devices)
    devices = given or tuple(d for d in local_devices() if d.kind == "cpu")
    if len(devices) < 2 or any(d.kind != "cpu" for d in devices):
        return
    cluster = Cluster(devices)
    if load_profile(cluster) is None:
        _say(f"evener: measuring {', '.join(d.name for d in devices)} once, to choose a layout")
        measure(cluster, quick=True)


async def _serve(
    options: EngineOptions,
    host: str,
    port: int,
    api_key: str | None,
    names: tuple[str, ...],
    origins: tuple[str, ...],
    template: str | None,
) -> None:
    if options.plan == AUTO:
        _measure(options)
    prepared = prepare(options)
    source = prepared.source
    _say(f"evener: {source.name}, {prepared.plan.name}, policy {options.policy}")
    if prepared.why:
        _say(f"  chosen: {prepared.why}")
    for line in describe(prepared.plan):
        _say(f"  {line}")
    if prepared.profile.source == "default":
        _say("  devices not measured yet, speeds are assumed; run `evener devices` once for better splits")
    tokens = min(prepared.kv_blocks) * 16
    _say(
        f"  {tokens} tokens of KV per replica, sequences up to {prepared.max_model_len}, "
        f"batches up to {prepared.max_num_batched_tokens} tokens"
    )
    listener = bind(host, port)  # a port in use is refused before the model loads
    starting = asyncio.create_task(start_engine(prepared=prepared, progress=lambda text: _say(f"  {text}")))
    await asyncio.sleep(0)  # the workers are started here; the front and the tokenizer load while they do
    front = asyncio.create_task(asyncio.to_thread(_load_front, source))
    try:
        engine, tokenizer = await asyncio.gather(starting, front)  # whichever fails first is told at once
    except BaseException:
        starting.cancel()
        done = (await asyncio.gather(starting, return_exceptions=True))[0]
        if isinstance(done, LiveEngine):
            await done.close()
        raise
    try:
        from evener.serve.app import create_app
        from evener.serve.front import FrontConfig
        from evener.serve.server import run

        config = FrontConfig(
            served_model_names=names or (source.name,), eos_token_ids=source.eos_token_ids, api_key=api_key,
            allowed_origins=origins, chat_template=template,
        )  # fmt: skip
        app = create_app(engine, tokenizer, config)
        await run(app, host, port, listener=listener, ready=lambda p: _say(f"evener: ready on http://{host}:{p}/v1"))
    finally:
        await engine.close()
