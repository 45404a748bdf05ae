"""The options that every verb with an engine shares, defined once."""

import functools
import inspect
from collections.abc import Callable
from typing import Annotated, Any, ParamSpec, TypeVar

import typer

from evener.api import EngineOptions
from evener.plan.load import AUTO

P = ParamSpec("P")
R = TypeVar("R")

_DEFAULTS = EngineOptions()
_SIZES = ("tensor_parallel_size", "pipeline_parallel_size", "data_parallel_size")


def _all(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, .gguf file or hub id. Default: the installed SmolLM2.", show_default=False),
    ] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option(
            "--devices",
            "--device",
            help="cpu:0, cpu:0-7, cpu:0#1, with ,slowdown=2,memory=1GiB. Repeatable; one "
            "option may name several, separated by spaces.",
            show_default="one per core",
        ),
    ] = None,
    tensor_parallel_size: Annotated[
        int | None, typer.Option("--tensor-parallel-size", "-tp", help="Shards per stage.", show_default="1")
    ] = None,
    pipeline_parallel_size: Annotated[
        int | None, typer.Option("--pipeline-parallel-size", "-pp", help="Stages per replica.", show_default="1")
    ] = None,
    data_parallel_size: Annotated[
        int | None, typer.Option("--data-parallel-size", "-dp", help="Replicas.", show_default="1")
    ] = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help="Plan file (YAML), or auto to choose, instead of -tp, -pp, -dp.",
            show_default="serve: auto, if none of the three is given",
        ),
    ] = None,
    split: Annotated[
        str, typer.Option(help="Default plans: time (measured) or equal (the pre-training habit).")
    ] = "time",
    traffic_mix: Annotated[
        str | None, typer.Option(help="Traffic that default plans are made for, like in=1020,out=129.")
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="Of the weights: fp32, bf16, int8, or auto: the fastest as measured.")
    ] = _DEFAULTS.dtype,
    kv_dtype: Annotated[
        str | None, typer.Option(help="Of the KV cache: fp32, bf16 or int8.", show_default="as --dtype")
    ] = None,
    policy: Annotated[str, typer.Option(help="equal-time, fcfs or static.")] = _DEFAULTS.policy,
    router: Annotated[str, typer.Option(help="least-work, least-requests or round-robin.")] = _DEFAULTS.router,
    max_model_len: Annotated[
        int | None, typer.Option(help="Prompt and output tokens of one sequence.", show_default="what fits")
    ] = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences at once, per replica.")] = _DEFAULTS.max_num_seqs,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(help="Tokens of one batch.", show_default="a predicted half second")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="Waiting requests; one more gets 429.")] = _DEFAULTS.max_queue,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="Per device, like 1GiB.", show_default="a share of what is free")
    ] = None,
    static_batch: Annotated[int, typer.Option(help="static policy: requests of a batch.")] = _DEFAULTS.static_batch,
    static_wait_s: Annotated[
        float, typer.Option(help="static policy: longest wait for a full batch.")
    ] = _DEFAULTS.static_wait_s,
    start_timeout_s: Annotated[float, typer.Option("--start-timeout", help="Seconds.")] = _DEFAULTS.start_timeout_s,
    worker_timeout_s: Annotated[
        float, typer.Option("--worker-timeout", help="Seconds without progress until a worker counts as hung.")
    ] = _DEFAULTS.worker_timeout_s,
    record: Annotated[
        str | None, typer.Option(help="Write every event, command and span to this file, for replay.")
    ] = None,
    ledger: Annotated[bool, typer.Option(help="Account for every device-second.")] = _DEFAULTS.ledger,
    trace_segments: Annotated[
        bool, typer.Option("--trace-segments", help="Keep every stretch inside a batch too, for traces.")
    ] = _DEFAULTS.trace_segments,
) -> None: ...


def with_engine_options(command: Callable[..., R]) -> Callable[..., R]:
    """Give a command the engine options; it receives them as `options: EngineOptions`, its first argument."""
    shared = inspect.signature(_all).parameters
    own = [
        p.replace(kind=inspect.Parameter.KEYWORD_ONLY)
        for name, p in inspect.signature(command).parameters.items()
        if name != "options"
    ]

    @functools.wraps(command)
    def wrapper(**given: Any) -> R:
        values = {name: given.pop(name) for name in shared}
        unsaid = [name for name in _SIZES if values[name] is None]
        if command.__name__ == "serve" and len(unsaid) == len(_SIZES) and values["split"] == _DEFAULTS.split:
            values["plan"] = values["plan"] or AUTO
        values |= dict.fromkeys(unsaid, 1)
        values["devices"] = tuple(d for text in values["devices"] or () for d in text.split())
        return command(EngineOptions(**values), **given)

    wrapper.__signature__ = inspect.Signature([*shared.values(), *own])  # type: ignore[attr-defined]
    wrapper.__annotations__ = {p.name: p.annotation for p in [*shared.values(), *own]}
    return wrapper


def said(ctx: typer.Context) -> dict[str, str]:
    """What the command line gives, be it with its default value: name of the parameter -> as the user knows it."""
    found = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name is not None and source is not None and source.name == "COMMANDLINE":
            option = parameter.param_type_name == "option"
            found[parameter.name] = max(parameter.opts, key=len) if option else parameter.name.upper()
    return found
