"""`evener bench`: load a server (or an engine in this process) and report how it was served."""

import asyncio
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Annotated

import msgspec
import typer
from msgspec import structs
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evener.api import EngineOptions
from evener.cli.engine_options import said, with_engine_options
from evener.cli.paths import check_folder, writing
from evener.errors import InvalidInput
from evener.workload import drive
from evener.workload.client import CompletionsClient, ask_served, open_session
from evener.workload.drive import OnDone, Record, Send
from evener.workload.offline import EngineClient, open_offline_engine
from evener.workload.report import Report, Summary, make_report
from evener.workload.slo import parse_slo
from evener.workload.traffic import Traffic, check_fits, check_vocabulary, make_requests, make_warm_up


@with_engine_options
def bench(
    options: EngineOptions,
    ctx: typer.Context,
    url: Annotated[str, typer.Option(help="Server to load, without /v1.")] = "http://127.0.0.1:8000",
    served: Annotated[
        str | None, typer.Option("--model", help="Served model (default: the server's first); offline: path or id.")
    ] = None,
    offline: Annotated[bool, typer.Option("--offline", help="Run an engine in this process, no HTTP.")] = False,
    requests: Annotated[
        int | None, typer.Option(min=1, help="How many (default: 64, or the whole trace).", show_default=False)
    ] = None,
    concurrency: Annotated[int | None, typer.Option(min=1, help="Closed loop: this many outstanding.")] = None,
    rate: Annotated[
        float | None, typer.Option(help="Open loop: requests per second (default: inf, all at once).")
    ] = None,
    burstiness: Annotated[
        float, typer.Option(help="Gamma shape of the gaps: 1 Poisson, below 1 burstier, inf constant.")
    ] = 1.0,
    trace: Annotated[
        Path | None,
        typer.Option(help="CSV arrival_s,input_tokens,output_tokens; with --rate or --concurrency: its lengths only."),
    ] = None,
    rate_scale: Annotated[float, typer.Option(help="Send a trace this many times as fast.")] = 1.0,
    context: Annotated[
        int | None, typer.Option(help="Scale all trace lengths by one factor so that the longest request fits.")
    ] = None,
    input_tokens: Annotated[
        str | None, typer.Option(help="N, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:LOW:HIGH].")
    ] = None,
    output_tokens: Annotated[str | None, typer.Option(help="The same for outputs.")] = None,
    prompts: Annotated[str, typer.Option(help="`ids` (random token ids) or `text` (random words).")] = "ids",
    token_ids: Annotated[str, typer.Option(help="Range of random ids, LOW:HIGH.")] = "100:32000",
    tokenizer: Annotated[
        Path | None, typer.Option(help="Draw ids from this tokenizer instead, special ones excluded.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed gives the same requests and arrivals.")] = 0,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    ignore_eos: Annotated[bool, typer.Option(help="Generate exactly the asked number of tokens.")] = True,
    warm_up: Annotated[int, typer.Option(min=0, help="Send this many requests first, unmeasured.")] = 0,
    slo: Annotated[str | None, typer.Option(help="Goodput bounds, as in ttft=200ms,tpot=50ms,e2e=10s.")] = None,
    timeout: Annotated[float, typer.Option(min=0.001, help="Seconds until a request counts as failed.")] = 3600.0,
    api_key: Annotated[str | None, typer.Option(envvar="OPENAI_API_KEY", help="Sent as a bearer token.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Only JSON on stdout.")] = False,
    output: Annotated[Path | None, typer.Option(help="Also write JSON with every request here.")] = None,
    progress: Annotated[
        bool | None, typer.Option(help="Progress bar on stderr (default: on a terminal).", show_default=False)
    ] = None,
) -> None:
    """Load an OpenAI-compatible server, or an engine in this process, and report latency, throughput and goodput."""
    bounds = parse_slo(slo) if slo is not None else None
    check_folder(output, "--output")
    traffic = Traffic(
        requests=requests, concurrency=concurrency, rate=rate, burstiness=burstiness, trace=trace,
        rate_scale=rate_scale, context=context, input_tokens=input_tokens, output_tokens=output_tokens,
        prompts=prompts, token_ids=token_ids, tokenizer=tokenizer, seed=seed,
    )  # fmt: skip
    todo = make_requests(traffic)
    warm = make_warm_up(traffic, warm_up) if warm_up else []
    if (options.model or "").startswith(("http://", "https://")):
        raise InvalidInput(f"{options.model} is a server, not a model; write --url {options.model}")
    _check_target(said(ctx), offline)
    if served is not None and options.model not in (None, served):
        raise InvalidInput(f"--model {served!r} and MODEL {options.model!r} differ; give one")
    options = structs.replace(options, model=options.model or served)
    if offline and prompts != "ids":
        raise InvalidInput("--offline takes token ids; leave --prompts at ids")
    if offline and not ignore_eos:
        raise InvalidInput("--offline generates exactly the asked number of tokens; leave out --no-ignore-eos")
    run = drive.new_run(todo, open_loop=concurrency is None)

    @asynccontextmanager
    async def target() -> AsyncIterator[tuple[Send, str | None, int | None]]:
        if offline:
            async with open_offline_engine(**structs.asdict(options)) as engine:
                check_vocabulary(todo, engine.model.vocab)
                yield EngineClient(engine, timeout, temperature).send, options.model, engine.max_model_len
        else:
            async with open_session(api_key) as session:
                base = url.rstrip("/").removesuffix("/v1")
                found = await ask_served(session, base, served)
                client = CompletionsClient(session, base, found.model, ignore_eos, temperature, timeout)
                yield client.send, found.model, found.max_model_len

    async def measure() -> str | None:
        async with target() as (send, name, limit):
            check_fits(todo, limit)
            await drive.open_loop(warm, send, drive.new_run(warm, open_loop=True))
            with progress_bar(len(todo), sys.stderr.isatty() if progress is None else progress) as on_done:
                if concurrency is not None:
                    await drive.closed_loop(todo, concurrency, send, run, on_done)
                else:
                    await drive.open_loop(todo, send, run, on_done)
        return name

    try:
        name, interrupted = asyncio.run(measure()), False
    except KeyboardInterrupt:
        if not run.duration_s:
            raise
        name, interrupted = served, True
    report = make_report(run, bounds)
    asked = msgspec.to_builtins(traffic, enc_hook=str)
    settings = {"target": "offline" if offline else url, "model": name, "slo": slo, **asked}
    figures = {**msgspec.to_builtins(report), "interrupted": interrupted, "settings": settings}
    if json:
        print(msgspec.json.format(msgspec.json.encode(figures), indent=2).decode())
    else:
        print_report(report)
    if output is not None:
        with writing(output, "--output"):
            output.write_bytes(msgspec.json.encode({**figures, "records": run.records}))
    if interrupted or not report.completed:
        raise typer.Exit(130 if interrupted else 1)


def _check_target(given: dict[str, str], offline: bool) -> None:
    """Refuse what the chosen target would ignore. `given`: parameters -> as the user knows them."""
    of_engines = [flag for name, flag in given.items() if name in EngineOptions.__struct_fields__]
    of_servers = [flag for name, flag in given.items() if name in ("url", "api_key")]
    if of_engines and not offline:
        raise InvalidInput(f"{', '.join(of_engines)}: a running server has its own; leave out, or add --offline")
    if of_servers and offline:
        raise InvalidInput(f"{', '.join(of_servers)}: --offline asks no server; leave out one or the other")


@contextmanager
def progress_bar(total: int, shown: bool) -> Iterator[OnDone]:
    """A bar on stderr; yields the callback for each request that ended."""
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown, refresh_per_second=2) as bar:
        task = bar.add_task("requests", total=total, note="")
        failed = tokens = 0

        def on_done(record: Record) -> None:
            nonlocal failed, tokens
            failed += record.failure is not None
            tokens += record.output_tokens
            bar.update(task, advance=1, note=f"{tokens} tokens" + (f", [red]{failed} failed[/red]" if failed else ""))

        yield on_done


def print_report(report: Report) -> None:
    """Tables for a reader, on stdout."""
    console = Console()
    counts = Table(show_header=False, box=None)
    for name, value in (
        ("requests", f"{report.completed} completed, {report.failed} failed of {report.requests}"),
        ("duration", f"{report.duration_s:.2f} s"),
        ("tokens", f"{report.input_tokens} in, {report.output_tokens} out"),
        ("throughput", f"{report.output_tok_s:.1f} output tok/s, {report.total_tok_s:.1f} tok/s in all"),
        ("goodput", f"{report.goodput_req_s:.3f} req/s"),
        ("arrivals", _arrivals(report)),
        ("client", f"{report.client_cpu_s:.2f} s CPU" + _late(report.lateness_ms)),
    ):
        counts.add_row(name, value)
    if report.short_outputs:
        counts.add_row("[yellow]short[/yellow]", f"{report.short_outputs} answers shorter than asked for")
    for reason, count in report.failures.items():
        counts.add_row(f"[red]{reason}[/red]", f"{count}; first: {escape(report.failure_examples[reason])}")
    times = Table("ms", "p50", "p90", "p99", "mean", box=None)
    for column in times.columns[1:]:
        column.justify = "right"
    rows = (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms), ("ITL", report.itl_ms), ("end to end", report.e2e_ms))
    for name, s in rows:
        times.add_row(name, *("-" if v is None else f"{v:.1f}" for v in (s.p50, s.p90, s.p99, s.mean)))
    console.print(counts)
    console.print(times)


def _arrivals(report: Report) -> str:
    if not report.open_loop:
        return "closed loop: a request is sent when another ends"
    return f"{report.arrival_req_s:.3f} req/s" if report.arrival_req_s else "at once"


def _late(lateness: Summary) -> str:
    if lateness.p99 is None:
        return ""
    return f", sent late by p50 {lateness.p50:.1f} ms, p99 {lateness.p99:.1f} ms"
