"""`evener simulate`: how a plan would serve this traffic, and where every device-second would go."""

from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evener.api import describe
from evener.cli import shared_options
from evener.execute.sim.figures import Percentiles
from evener.ledger.account import Account, Use
from evener.ledger.causes import Cause
from evener.planning import DEFAULT_TRAFFIC
from evener.simulate import Simulated, SimulateOptions
from evener.simulate import simulate as run

MOST_DEVICES = 16
"""Lines of the ledger; more devices are shown by replica, and more replicas all together."""


def simulate(
    model: shared_options.Model = None,
    cluster: shared_options.ClusterFile = None,
    devices: shared_options.Devices = None,
    plan: Annotated[
        str | None, typer.Option(help="Plan file (YAML), or auto to choose, instead of -tp, -pp, -dp.")
    ] = None,
    tensor_parallel_size: Annotated[int, typer.Option("--tensor-parallel-size", "-tp", help="Shards per stage.")] = 1,
    pipeline_parallel_size: Annotated[
        int, typer.Option("--pipeline-parallel-size", "-pp", help="Stages per replica.")
    ] = 1,
    data_parallel_size: Annotated[int, typer.Option("--data-parallel-size", "-dp", help="Replicas.")] = 1,
    split: Annotated[str, typer.Option(help="Splits of -tp and -pp: time or equal.")] = "time",
    traffic: Annotated[
        str, typer.Option(help="Trace (CSV), or rate=4,in=lognormal:180:0.8,out=128,requests=1000,burstiness=0.5.")
    ] = DEFAULT_TRAFFIC,
    slo: Annotated[str | None, typer.Option(help="Goodput bounds, as in ttft=200ms,tpot=50ms,e2e=10s.")] = None,
    dtype: shared_options.Dtype = None,
    kv_dtype: shared_options.KvDtype = None,
    kv_cache_memory: shared_options.KvCacheMemory = None,
    max_num_seqs: shared_options.MaxNumSeqs = None,
    max_num_batched_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens of one batch.", show_default="a predicted half second")
    ] = None,
    max_queue: Annotated[
        int | None, typer.Option(min=0, help="Waiting requests; one more is refused.", show_default="no limit")
    ] = None,
    policy: shared_options.Policy = "equal-time",
    costs: shared_options.Costs = "rates",
    router: Annotated[str, typer.Option(help="least-work, least-requests or round-robin.")] = "least-work",
    max_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="What requests ask for; answers still end where the traffic says.",
                     show_default="just that, as in bench"),
    ] = None,
    static_batch: Annotated[int, typer.Option(min=1, help="static policy: requests of a batch.")] = 32,
    static_wait_s: Annotated[float, typer.Option(min=0, help="static policy: longest wait for a full batch.")] = 0.1,
    host_us: Annotated[
        float, typer.Option(min=0, help="Control time between a result and the next batch, beside the profile's.")
    ] = 0.0,
    fail: Annotated[list[str] | None, typer.Option(help="Lose a device: DEVICE@SECONDS. Repeatable.")] = None,
    slow: Annotated[list[str] | None, typer.Option(help="Slow it down: DEVICE@SECONDS=FACTOR. Repeatable.")] = None,
    ledger: Annotated[bool, typer.Option(help="Account for every device-second.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:  # fmt: skip
    """Serve this traffic with a plan in virtual time: throughput, latency, goodput and the ledger. Starts nothing."""
    options = SimulateOptions(
        model=model, cluster=cluster, devices=shared_options.device_names(devices), plan=plan,
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size,
        data_parallel_size=data_parallel_size, split=split, traffic=traffic, slo=slo, dtype=dtype, kv_dtype=kv_dtype,
        kv_cache_memory=kv_cache_memory, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens,
        max_queue=max_queue, policy=policy, costs=costs, router=router, max_tokens=max_tokens,
        static_batch=static_batch, static_wait_s=static_wait_s, host_us=host_us, fail=tuple(fail or ()),
        slow=tuple(slow or ()), ledger=ledger,
    )  # fmt: skip
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json, refresh_per_second=2) as bar:
        task = bar.add_task("simulating", total=None)
        result = run(options, lambda ended: bar.update(task, completed=ended) if ended % 256 == 0 else None)
    if as_json:
        print(msgspec.json.format(msgspec.json.encode(_figures(result)), indent=1).decode())
    else:
        _show(result)


def _figures(result: Simulated) -> dict[str, Any]:
    return msgspec.to_builtins(result)  # type: ignore[no-any-return]


def _show(result: Simulated) -> None:
    console = Console()
    report = result.report

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    lines = describe(result.plan)
    for line in lines[:MOST_DEVICES]:
        say(line)
    if len(lines) > MOST_DEVICES:
        say(f"... {len(lines)} shards in {len(result.plan.replicas)} replicas")
    say(
        f"{report.completed} of {report.requests} requests completed in {report.duration_s:.1f} s (virtual); "
        f"{report.input_tokens} tokens in, {report.output_tokens} out"
    )
    for reason, count in report.failures.items():
        say(f"  {count} ended as {reason}")
    say(
        f"{report.output_tok_s:.1f} output tok/s, {report.total_tok_s:.1f} tok/s in all, "
        f"{report.completed_req_s:.3f} req/s, goodput {report.goodput_req_s:.3f} req/s ({report.met:.1%} of requests)"
    )
    times = Table("ms", "p50", "p90", "p99", "mean", "max", box=None)
    for column in times.columns[1:]:
        column.justify = "right"
    for name, of in (("TTFT", report.ttft_ms), ("TPOT", report.tpot_ms), ("end to end", report.e2e_ms)):
        times.add_row(name, *_cells(of))
    console.print(times)
    if result.account is not None:
        console.print(_ledger(result.account))
        for line in result.verdict:
            say(line)
    say(f"{result.events} events in {result.took_s:.2f} s of processor time")


def _cells(of: Percentiles) -> list[str]:
    return ["-" if v is None else f"{v:.1f}" for v in (of.p50, of.p90, of.p99, of.mean, of.max)]


def _ledger(account: Account) -> Table:
    """Percent of the time of each device (or replica, if they are many) by cause."""
    rows: list[tuple[str, Use]] = list(account.devices.items())
    if len(rows) > MOST_DEVICES:
        rows = [(f"replica {name}", use) for name, use in account.replicas.items()]
    if len(rows) > MOST_DEVICES:
        rows = []
    rows.append(("all", account.total))
    shown = [c for c in Cause if account.total.share(c) >= 0.0005]
    table = Table("% of time", *(c.label for c in shown), "of peak", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, use in rows:
        peak = "-" if use.achieved_over_peak is None else f"{100 * use.achieved_over_peak:.0f}%"
        table.add_row(name, *(f"{100 * use.share(c):.1f}" for c in shown), peak)
    return table
