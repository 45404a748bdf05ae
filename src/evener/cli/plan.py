"""`evener plan`: the layout that suits these devices and this traffic, and why."""

import json
from pathlib import Path
from typing import Annotated

import typer
from msgspec import structs
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from evener.cli import shared_options
from evener.cli.paths import check_folder, check_picture, writing
from evener.cli.plan_output import choice_json, serve_command, show_assessments, show_choice, show_sizes
from evener.errors import InvalidInput
from evener.plan.assess import assess as judge
from evener.plan.assess import judge_plan, parse_layout
from evener.plan.emit import ENGINES
from evener.plan.emit import emit as emit_commands
from evener.plan.load import load_plan, save_plan
from evener.plan.more import one_more
from evener.plan.planner import choose_plan
from evener.plan.search import Scored
from evener.plan.size import size_for
from evener.planning import DEFAULT_TRAFFIC, PlanOptions, check_objective, make_problem


def plan(
    context: typer.Context,
    model: shared_options.Model = None,
    cluster: shared_options.ClusterFile = None,
    devices: shared_options.Devices = None,
    traffic: Annotated[
        str, typer.Option(help="Trace (CSV), or rate=4,in=lognormal:180:0.8,out=128; without a rate: throughput.")
    ] = DEFAULT_TRAFFIC,
    slo: Annotated[str | None, typer.Option(help="Plan for goodput within ttft=2s,tpot=100ms,e2e=10s.")] = None,
    dtype: shared_options.Dtype = None,
    kv_dtype: shared_options.KvDtype = None,
    kv_cache_memory: shared_options.KvCacheMemory = None,
    max_num_seqs: shared_options.MaxNumSeqs = None,
    policy: shared_options.Policy = "equal-time",
    costs: shared_options.Costs = "rates",
    requests: Annotated[int, typer.Option(min=8, help="Requests to simulate, at most.")] = 400,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here (YAML).")] = None,
    assess: Annotated[
        list[str] | None,
        typer.Option("--assess", help="Judge this layout, as in tp=8,pp=4,dp=2. Repeatable.", show_default=False),
    ] = None,
    what_if: Annotated[
        Path | None,
        typer.Option(
            help="What this plan (YAML) would do on the traffic, beside the choice, or with --check beside what ran.",
            show_default=False,
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            metavar="URL|FILE", help="Plan nothing: set beside what a running server (or a recording) achieved what is "
            "predicted for its plan on the same traffic.", show_default=False,
        ),
    ] = None,
    window: Annotated[
        float | None,
        typer.Option(help="--check: requests that ended in the last so many seconds.",
                     show_default="all that the server keeps"),
    ] = None,
    with_contention: Annotated[
        bool,
        typer.Option("--with-contention", help="--check: take as known what other processes took from the devices."),
    ] = False,
    api_key: Annotated[
        str | None, typer.Option(envvar="EVENER_API_KEY", show_envvar=True, help="--check: sent as a bearer token.")
    ] = None,
    size: Annotated[
        bool, typer.Option("--size", help="How many devices of each kind the rate and objective take.")
    ] = False,
    emit: Annotated[
        str | None, typer.Option(help="Launch commands for other engines: vllm or sglang.", show_default=False)
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto front here (PNG; the extra `plot`).")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:  # fmt: skip
    """Choose the layout that suits these devices and this traffic, and say why."""
    if check is not None:
        _refuse_beside_check(_given(context))
        from evener.cli.plan_check import check as check_run

        check_run(check, window, what_if, with_contention, api_key, as_json_)
        return
    if _given(context) & {"window", "with_contention", "api_key"}:
        raise InvalidInput(
            "--window, --with-contention and --api-key are for --check; give the URL of a server with it"
        )
    options = PlanOptions(
        model=model,
        cluster=cluster,
        devices=shared_options.device_names(devices),
        traffic=traffic,
        slo=slo,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=max_num_seqs,
        policy=policy,
        costs=costs,
    )
    check_folder(output, "--output")
    if emit is not None and emit not in ENGINES:
        raise InvalidInput(f"--emit {emit!r} is not one of {', '.join(ENGINES)}")
    if size and (assess or emit or what_if or output or plot):
        raise InvalidInput(
            "--size answers with numbers of devices, not with a plan; leave out --assess, --what-if, --emit, --output "
            "and --plot"
        )
    if emit and (assess or what_if):
        raise InvalidInput("--emit prints commands for the chosen plan; leave out --assess and --what-if")
    check_picture(plot, "--plot")
    problem = check_objective(make_problem(options))
    layouts = [parse_layout(text) for text in assess or ()]
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json_) as bar:
        task = bar.add_task("searching", total=None)

        def progress(what: str, done: int, steps: int) -> None:
            bar.update(task, description=what, completed=done, total=steps)

        if size:
            sizes = list(size_for(problem, requests, progress))
        else:
            choice = choose_plan(problem, requests=requests, progress=progress)
            assessed = [judge(problem, layout, choice.items, choice.best) for layout in layouts]
            if what_if is not None:
                plan = structs.replace(load_plan(what_if, problem.model), name=f"what if: {what_if.name}")
                assessed.append(judge_plan(problem, plan, choice.items, choice.best))
            bar.update(task, description="one device more", total=None)
            more = [] if assessed else list(one_more(problem, Scored(choice.best.plan, choice.best.load)))
    if size:
        show_sizes(sizes, problem, as_json_)
        return
    if output is not None:
        with writing(output, "--output"):
            save_plan(choice.best.plan, output)
    if plot is not None:
        from evener.plan.plot import draw_front

        draw_front(choice, plot)
    launches = emit_commands(emit, problem, choice.best, _weights(model) or "MODEL") if emit is not None else []
    if assessed:
        show_assessments(assessed, choice, as_json_)
    elif as_json_:
        typer.echo(json.dumps(choice_json(problem, choice, more, launches, output), indent=1))
    else:
        served = serve_command(problem, choice.best.plan, output, _weights(model), kv_cache_memory) if output else ""
        show_choice(problem, choice, more, launches, output, served)


def _weights(model: str | None) -> str | None:
    """Where the weights are of a model that may be named by its config.json alone."""
    path = Path(model) if model is not None else None
    return str(path.parent) if path is not None and path.name == "config.json" else model


def _given(context: typer.Context) -> set[str]:
    """Parameters that were said on the command line."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return {name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"}


def _refuse_beside_check(given: set[str]) -> None:
    """A check takes model, devices and traffic from the run itself."""
    others = sorted(given - {"check", "window", "what_if", "with_contention", "api_key", "as_json_"})
    if others:
        names = ", ".join(name.replace("_", "-") for name in others)
        raise InvalidInput(f"--check takes model, devices and traffic from what was served; leave out {names}")
