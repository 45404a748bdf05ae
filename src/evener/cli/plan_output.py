"""What `evener plan` prints: tables and sentences for people, JSON for programs."""

import json
import shlex
from pathlib import Path
from typing import Any

import msgspec
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from evener.api import EngineOptions, describe
from evener.plan.assess import Assessment
from evener.plan.emit import Launch
from evener.plan.explain import against, binding, error_line, gains, headline, memory_line
from evener.plan.more import Gain
from evener.plan.planner import Choice, as_json, figures
from evener.plan.problem import Problem
from evener.plan.size import MET, MOST, Size
from evener.plan.trial import Tried
from evener.spec.cluster import Device
from evener.spec.plan import Plan


def choice_json(
    problem: Problem, choice: Choice, more: list[Gain], launches: list[Launch], output: Path | None
) -> dict[str, Any]:
    """Everything `evener plan` knows, as plain data."""
    return {
        **as_json(choice),
        "profile": problem.profile.source,
        "assumed": list(problem.profile.missing),
        "demand": {k: getattr(problem.demand, k) for k in problem.demand.__struct_fields__},
        "binding": binding(problem, choice.best.plan, choice.best),
        "error": error_line(problem),
        "one_more": [{k: getattr(g, k) for k in g.__struct_fields__} for g in more],
        "layout": list(describe(choice.best.plan)),
        "launch": [msgspec.to_builtins(x) for x in launches],
        "output": str(output) if output is not None else None,
    }


def show_choice(
    problem: Problem, choice: Choice, more: list[Gain], launches: list[Launch], output: Path | None, served: str
) -> None:
    """For people. `served`: how to serve what was written to `output`, or nothing."""
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
    say(error_line(problem))
    say(f"{choice.considered} plans scored in {choice.search_s:.1f} s, the best simulated in {choice.trial_s:.1f} s")
    for x in launches:
        say(f"replica {x.replica}: " + (x.command or f"not for this engine: {'; '.join(x.notes)}"))
        for note in x.notes if x.command else ():
            say(f"  note: {note}")
    if output is not None:
        say(f"wrote {output}" + (f": {served}" if served else ""))


def serve_command(
    problem: Problem, plan: Plan, output: Path, model: str | None = None, kv_cache_memory: str | None = None
) -> str:
    """How to serve what was planned: a plan file says nothing of the model, of slow-downs, memory, dtypes, policy and
    limits. Empty for devices that are not here."""
    used = set(plan.devices())
    devices = [d for d in problem.cluster.devices if d.name in used]
    if any(d.host != "localhost" or d.kind != "cpu" for d in devices):
        return ""
    what = f" {shlex.quote(model)}" if model is not None else ""
    parts = [f"evener serve{what} --plan {shlex.quote(str(output))}"]
    if any(d.slowdown > 1.0 or d.memory is not None for d in devices):
        parts.append(f"--devices {shlex.quote(' '.join(map(_device_text, devices)))}")
    memory, served = problem.memory, EngineOptions()
    if memory.dtype != served.dtype:
        parts.append(f"--dtype {memory.dtype}")
    if memory.kv_dtype != memory.dtype:
        parts.append(f"--kv-dtype {memory.kv_dtype}")
    if kv_cache_memory is not None:
        parts.append(f"--kv-cache-memory {kv_cache_memory}")
    if problem.policy != served.policy:
        parts.append(f"--policy {problem.policy}")
    if problem.max_num_seqs != served.max_num_seqs:
        parts.append(f"--max-num-seqs {problem.max_num_seqs}")
    return " ".join(parts)


def _device_text(device: Device) -> str:
    """As `parse_device` reads it."""
    slow = f",slowdown={device.slowdown:g}" if device.slowdown > 1.0 else ""
    return device.name + slow + (f",memory={device.memory}" if device.memory is not None else "")


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
        f"{t.load.tokens_s:.4g}", f"{t.full_tokens_s:.4g}", f"{t.met:.0%}", f"{t.ttft.p90:.3g} s",
        f"{t.tpot.p90 * 1e3:.3g} ms", f"{t.e2e.mean:.3g} s",
    ]  # fmt: skip


def show_assessments(assessed: list[Assessment], choice: Choice, as_json_: bool) -> None:
    """Verdicts with their figures and ledgers."""
    if as_json_:
        rows = [
            {
                "layout": a.layout,
                "verdict": a.verdict,
                "findings": list(a.findings),
                "predicted": figures(a.tried) if a.tried is not None else None,
            }
            for a in assessed
        ]
        typer.echo(json.dumps({"assessed": rows, "choice": figures(choice.best)}, indent=1))
        return
    console = Console()
    for a in assessed:
        console.print(escape(f"{a.layout}: {a.verdict}"), highlight=False, soft_wrap=True, style="bold")
        for text in a.findings:
            console.print(escape(f"  {text}"), highlight=False, soft_wrap=True)
        if a.tried is not None:
            console.print(_ledger(a.tried))


def _ledger(t: Tried) -> Table:
    table = Table(title="Simulated ledger, share of each device's time")
    causes = list(dict.fromkeys(c for shares in t.ledger.values() for c, s in shares.items() if s >= 0.005))
    for name in ("device", *causes):
        table.add_column(name, justify="left" if name == "device" else "right")
    for device, shares in t.ledger.items():
        table.add_row(escape(device), *(f"{shares.get(c, 0.0):.1%}" for c in causes))
    return table


def show_sizes(sizes: list[Size], problem: Problem, as_json_: bool) -> None:
    """How many of each kind."""
    if as_json_:
        rows = [
            {
                "like": s.like,
                "count": s.count,
                "reason": s.reason,
                "predicted": figures(s.tried) if s.tried is not None else None,
            }
            for s in sizes
        ]
        typer.echo(json.dumps({"rate_req_s": problem.demand.rate, "sizes": rows}, indent=1))
        return
    within = f", {MET:.0%} of them within the objective" if problem.bounds else ""
    typer.echo(f"{problem.demand.rate:.3g} requests/s{within}, on one kind of device alone:")
    for s in sizes:
        if s.tried is None:
            typer.echo(f"  {s.like}: {MOST} are not enough ({s.reason})")
            continue
        t = s.tried
        typer.echo(
            f"  {s.count} like {s.like}: {t.plan.name}; at most {t.load.requests_s:.3g} requests/s, p90 TTFT "
            f"{t.ttft.p90:.3g} s, p90 TPOT {t.tpot.p90 * 1e3:.3g} ms"
        )
