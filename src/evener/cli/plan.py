"""`evener plan`: the layout that suits these devices and this traffic, and why."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from evener.api import describe
from evener.errors import InvalidInput
from evener.plan.explain import against, binding, gains, headline, memory_line
from evener.plan.load import save_plan
from evener.plan.more import Gain, one_more
from evener.plan.planner import Choice, as_json, choose_plan
from evener.plan.problem import Problem
from evener.plan.search import Scored
from evener.plan.trial import Tried
from evener.planning import DEFAULT_TRAFFIC, PlanOptions, make_problem


def plan(
    model: Annotated[
        str | None,
        typer.Argument(help="Directory, .gguf file, hub id or config.json. Default: the installed SmolLM2.",
                       show_default=False),
    ] = None,
    cluster: Annotated[str | None, typer.Option(help="Devices and links (YAML, docs/clusters.md).")] = None,
    devices: Annotated[
        list[str] | None,
        typer.Option("--devices", "--device", help="As for serve; they need not be here. Repeatable, or separated by "
                     "spaces.", show_default="all of this host"),
    ] = None,
    traffic: Annotated[
        str, typer.Option(help="Trace (CSV), or rate=4,in=lognormal:180:0.8,out=128; without a rate: throughput.")
    ] = DEFAULT_TRAFFIC,
    slo: Annotated[str | None, typer.Option(help="Plan for goodput within ttft=2s,tpot=100ms,e2e=10s.")] = None,
    dtype: Annotated[
        str | None, typer.Option(help="Of the weights.", show_default="fp32 on CPUs, bf16 or fp16 on GPUs")
    ] = None,
    kv_dtype: Annotated[str | None, typer.Option(help="Of the KV cache.", show_default="as --dtype")] = None,
    kv_cache_memory: Annotated[
        str | None, typer.Option(help="For devices that declare no memory.", show_default="a share of what is free")
    ] = None,
    max_num_seqs: Annotated[
        int | None, typer.Option(min=1, help="Sequences at once, per replica.", show_default="64 on CPUs, 256 on GPUs")
    ] = None,
    policy: Annotated[str, typer.Option(help="equal-time, fcfs or static.")] = "equal-time",
    requests: Annotated[int, typer.Option(min=8, help="Requests to simulate, at most.")] = 400,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Write the plan here (YAML).")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the Pareto front here (PNG; the extra `plot`).")] = None,
    as_json_: Annotated[bool, typer.Option("--json", help="Print JSON only.")] = False,
) -> None:  # fmt: skip
    """Choose the layout that suits these devices and this traffic, and say why."""
    options = PlanOptions(
        model=model,
        cluster=cluster,
        devices=tuple(d for text in devices or () for d in text.split()),
        traffic=traffic,
        slo=slo,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kv_cache_memory=kv_cache_memory,
        max_num_seqs=max_num_seqs,
        policy=policy,
    )
    problem = make_problem(options)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=as_json_) as bar:
        task = bar.add_task("searching", total=None)
        choice = choose_plan(
            problem, requests=requests,
            progress=lambda what, done, steps: bar.update(task, description=what, completed=done, total=steps),
        )  # fmt: skip
        bar.update(task, description="one device more", total=None)
        more = list(one_more(problem, Scored(choice.best.plan, choice.best.load)))
    if output is not None:
        try:
            save_plan(choice.best.plan, output)
        except OSError as error:
            raise InvalidInput(f"--output {output}: {error.strerror}; give a path that can be written") from error
    if plot is not None:
        from evener.plan.plot import draw_front

        draw_front(choice, plot)
    if as_json_:
        typer.echo(json.dumps(_json(problem, choice, more, output), indent=1))
    else:
        _show(problem, choice, more, output)


def _json(problem: Problem, choice: Choice, more: list[Gain], output: Path | None) -> dict[str, Any]:
    return {
        **as_json(choice),
        "profile": problem.profile.source,
        "assumed": list(problem.profile.missing),
        "demand": {k: getattr(problem.demand, k) for k in problem.demand.__struct_fields__},
        "binding": binding(problem, choice.best.plan, choice.best),
        "one_more": [{k: getattr(g, k) for k in g.__struct_fields__} for g in more],
        "layout": list(describe(choice.best.plan)),
        "output": str(output) if output is not None else None,
    }


def _show(problem: Problem, choice: Choice, more: list[Gain], output: Path | None) -> None:
    console = Console()

    def say(text: str) -> None:
        console.print(escape(text), highlight=False, soft_wrap=True)

    say(headline(choice))
    for line in describe(choice.best.plan):
        say(f"  {line}")
    say(f"  {memory_line(problem, choice.best)}")
    console.print(_table(choice))
    for title, lines in (
        ("Why not the usual layouts", against(choice)),
        ("What binds", binding(problem, choice.best.plan, choice.best)),
        ("One device more", gains(more)),
    ):
        if lines:
            say(f"{title}:")
            for line in lines:
                say(f"  {line}")
    say(
        f"Speeds: {problem.profile.source}"
        + (f" ({'; '.join(problem.profile.missing)})" if problem.profile.missing else "")
    )
    say(f"{choice.considered} plans scored in {choice.search_s:.1f} s, the best simulated in {choice.trial_s:.1f} s")
    if output is not None:
        say(f"wrote {output}: evener serve --plan {output}")


def _table(choice: Choice) -> Table:
    table = Table(title=f"Predicted, by {choice.goal}")
    for name in ("plan", "at most", "tok/s", "in SLO", "TTFT p90", "TPOT p90", "mean e2e"):
        table.add_column(name, justify="left" if name == "plan" else "right", no_wrap=name != "plan")
    named = {id(b.tried): b.name for b in choice.baselines if b.tried is not None}
    rows = [choice.best, *choice.others]
    front = {id(t) for t in choice.front}
    for t in {id(t): t for t in rows}.values():
        mark = "> " if t is choice.best else "* " if id(t) in front else "  "
        table.add_row(mark + escape(named.get(id(t), t.plan.name)), *_cells(t))
    table.caption = (
        "> chosen, * on the Pareto front; at most: capacity by the cost model, output tok/s; the rest simulated"
    )
    return table


def _cells(t: Tried) -> list[str]:
    return [
        f"{t.load.tokens_s:.4g}", f"{t.tokens_s:.4g}", f"{t.met:.0%}", f"{t.ttft.p90:.3g} s",
        f"{t.tpot.p90 * 1e3:.3g} ms", f"{t.e2e.mean:.3g} s",
    ]  # fmt: skip
