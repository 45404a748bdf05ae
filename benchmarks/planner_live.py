"""Is the planner's choice the best plan? In eight situations and more, it is measured live beside all other plans.

Each situation names devices (with declared slow-downs), links and traffic; all requests are sent at once to an engine
without a server, and output tokens over the time to serve them all are compared. The planner is told the same requests
(`finite`). Measured beside its choice: every layout of two devices; of three, the most promising dozen by the cost
model; always the usual layouts (all TP, PP, DP, split equally). All are measured once; what came within `--near` of the
best, and the choice, then alternate over the rounds. Medians are quoted. Predicted and achieved are kept as back-tests
of this host: `evener plan` quotes their error. With `--only`, the other situations stay as an earlier run left them.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, cast

from common import RESULTS, BenchmarkFailed, markdown, save
from evener.api import make_options, prepare
from evener.cost.rates import Profile, default_profile
from evener.plan.auto import spread_items
from evener.plan.backtests import BackTest, describe_model, keep_backtest
from evener.plan.baselines import score_usual
from evener.plan.load import save_plan
from evener.plan.planner import choose_plan
from evener.plan.problem import Problem, demand_of
from evener.plan.search import Scored, search
from evener.plan.trial import try_plan
from evener.profile import load_profile
from evener.spec.cluster import Cluster, Link, parse_device
from evener.spec.memory import MemoryConfig
from evener.spec.traffic import parse_traffic_mix
from evener.units import Bytes, Seconds

MAX_SEQS = 32
KV = Bytes(512 << 20)
MOST_PLANS = 12


class Situation(NamedTuple):
    """Devices, one-way delay between the first two, and mean lengths."""

    name: str
    devices: tuple[str, ...]
    mix: str
    delay_s: float = 0.0


CHAT, SHORT, LONG = "in=200,out=64", "in=24,out=96", "in=700,out=16"
SITUATIONS = (
    Situation("two equal, chat", ("cpu:0", "cpu:1"), CHAT),
    Situation("two equal, short prompts", ("cpu:0", "cpu:1"), SHORT),
    Situation("two equal, long prompts", ("cpu:0", "cpu:1"), LONG),
    Situation("slow-down 2, chat", ("cpu:0", "cpu:1,slowdown=2"), CHAT),
    Situation("slow-down 4, chat", ("cpu:0", "cpu:1,slowdown=4"), CHAT),
    Situation("slow-down 4, long prompts", ("cpu:0", "cpu:1,slowdown=4"), LONG),
    Situation("1:2:4, chat", ("cpu:0", "cpu:1,slowdown=2", "cpu:1#1,slowdown=4"), CHAT),
    Situation("link of 2 ms, chat", ("cpu:0", "cpu:1"), CHAT, 0.002),
    Situation("link of 2 ms, slow-down 2, short prompts", ("cpu:0", "cpu:1,slowdown=2"), SHORT, 0.002),
)


def problem_of(s: Situation, requests: int, dtype: str) -> Problem:
    """What the planner is told."""
    prepared = prepare(make_options(devices=("cpu:0",), dtype=dtype))
    devices = tuple(parse_device(text) for text in s.devices)
    cluster = Cluster(devices, links_of(s))
    profile: Profile = load_profile(cluster) or default_profile(devices)
    if profile.source == "default":
        raise SystemExit("run `evener devices` first: the planner must know the speeds")
    items = spread_items(parse_traffic_mix(s.mix), 1024, requests)
    return Problem(
        model=prepared.model, cluster=cluster, profile=profile, demand=demand_of(items), items=items,
        memory=MemoryConfig(dtype, dtype, 512 + MAX_SEQS), kv_bytes=KV, max_num_seqs=MAX_SEQS, finite=True,
    )  # fmt: skip


def links_of(s: Situation) -> tuple[Link, ...]:
    """The delayed link, if there is one."""
    names = [text.partition(",")[0] for text in s.devices]
    return (Link(names[0], names[1], Seconds(s.delay_s)),) if s.delay_s else ()


def plans_to_measure(problem: Problem) -> list[Scored]:
    """The planner's own candidates and the usual layouts, each layout once."""
    listed = search(problem)[:MOST_PLANS]
    known = {s.plan.replicas for s in listed}
    for _, found in score_usual(problem):
        if isinstance(found, Scored) and found.plan.replicas not in known:
            listed.append(found)
            known.add(found.plan.replicas)
    return listed


def measure(s: Situation, scored: Scored, problem: Problem) -> float:
    """Output tokens per second of one live run, in a process of its own."""
    return float(in_child(__file__, s, scored, problem)["tokens_s"])


def in_child(script: str, s: Situation, scored: Scored, problem: Problem, **more: object) -> dict[str, Any]:
    """What `script --child JOB` prints, JSON, for a plan on the devices of a situation; the job also holds `more`."""
    used = set(scored.plan.devices())
    with tempfile.TemporaryDirectory() as tmp:
        path = Path(tmp) / "plan.yaml"
        save_plan(scored.plan, path)
        job = {
            "plan": str(path),
            "devices": [d for d in s.devices if d.partition(",")[0] in used],
            "links": [(x.a, x.b, x.delay) for x in links_of(s) if {x.a, x.b} <= used],
            "dtype": problem.memory.dtype,
            "items": [(i.input_tokens, i.output_tokens) for i in problem.items],
            **more,
        }
        command = [sys.executable, script, "--child", json.dumps(job)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BenchmarkFailed(f"{s.name}, {scored.plan.name}: {done.stderr[-2000:]}")
    return cast("dict[str, Any]", json.loads(done.stdout))


def engine_options(job: dict[str, Any]) -> dict[str, Any]:
    """Of the engine that a job asks for."""
    return {
        "plan": job["plan"], "devices": tuple(job["devices"]), "dtype": job["dtype"], "max_num_seqs": MAX_SEQS,
        "links": tuple(Link(a, b, Seconds(delay)) for a, b, delay in job["links"]),
        "kv_cache_memory": f"{KV}B", "max_model_len": 1024,
    }  # fmt: skip


def child(job: dict[str, Any]) -> None:
    """Serve the requests once and print the throughput."""
    from evener import LLM, SamplingParams

    rng = random.Random(0)
    prompts = [[rng.randrange(100, 32_000) for _ in range(n)] for n, _ in job["items"]]
    params = [SamplingParams(temperature=0.0, max_tokens=m, ignore_eos=True) for _, m in job["items"]]
    with LLM(**engine_options(job)) as llm:
        llm.generate([[7] * 64, [9] * 8], SamplingParams(temperature=0.0, max_tokens=8, ignore_eos=True))
        began = time.perf_counter()
        outputs = llm.generate(prompts, params)
        seconds = time.perf_counter() - began
    tokens = sum(len(o.outputs[0].token_ids) for o in outputs)
    print(json.dumps({"tokens_s": tokens / seconds}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="comma-separated numbers of situations, from 0")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--near", type=float, default=0.12, help="share of the best that asks for more rounds")
    parser.add_argument("--dtype", default="int8", help="of weights and KV cache")
    args = parser.parse_args()
    if args.child:
        child(json.loads(args.child))
        return
    picked = [SITUATIONS[int(k)] for k in args.only.split(",")] if args.only else list(SITUATIONS)
    summary: list[list[object]] = []
    detail: list[list[object]] = []
    figures: dict[str, Any] = {}
    for s in picked:
        problem = problem_of(s, args.requests, args.dtype)
        began = time.process_time()
        choice = choose_plan(problem)
        planned_s = time.process_time() - began
        candidates = plans_to_measure(problem)
        if all(c.plan.replicas != choice.best.plan.replicas for c in candidates):
            candidates.append(Scored(choice.best.plan, choice.best.load))
        runs: dict[int, list[float]] = {k: [] for k in range(len(candidates))}
        chosen = next(k for k, c in enumerate(candidates) if c.plan.replicas == choice.best.plan.replicas)
        near = list(runs)
        for r in range(args.rounds):
            for k in (near[(j + r) % len(near)] for j in range(len(near))):
                print(f"{s.name}: round {r + 1}, {candidates[k].plan.name}", file=sys.stderr, flush=True)
                runs[k].append(measure(s, candidates[k], problem))
            most = max(v[0] for v in runs.values())
            near = [k for k, v in runs.items() if k == chosen or v[0] >= (1 - args.near) * most]
        achieved = {k: median(v) for k, v in runs.items()}
        best = max(near, key=lambda k: achieved[k])
        predicted = choice.best.tokens_s
        row: list[object] = [s.name, candidates[chosen].plan.name, predicted, achieved[chosen]]
        row += [candidates[best].plan.name, achieved[best], achieved[chosen] / achieved[best], planned_s]
        summary.append(row)
        for k, c in enumerate(candidates):
            said = try_plan(problem, c, problem.items).tokens_s
            memory = problem.memory
            test = BackTest(
                describe_model(problem.model), c.plan.name, c.plan.devices(), said, achieved[k], memory.dtype,
                memory.kv_dtype,
            )  # fmt: skip
            keep_backtest(test)
            detail.append([s.name, c.plan.name, "+".join(c.plan.devices()), said, achieved[k], said / achieved[k] - 1])
        figures[s.name] = {"runs": {}}
        for k, c in enumerate(candidates):
            figures[s.name]["runs"][f"{c.plan.name} on {'+'.join(c.plan.devices())}"] = runs[k]
    if args.only and (earlier := RESULTS / "planner_live.json").exists():
        before = json.loads(earlier.read_text())
        names = [s.name for s in SITUATIONS]
        summary += [row for row in before["summary"] if row[0] not in figures]
        detail += [row for row in before["detail"] if row[0] not in figures]
        figures = {**before["figures"], **figures}
        summary.sort(key=lambda row: names.index(str(row[0])))
        detail.sort(key=lambda row: names.index(str(row[0])))
    print(markdown(["situation", "chosen", "predicted tok/s", "achieved tok/s", "best measured", "its tok/s",
                    "chosen over best", "planning CPU s"], summary))  # fmt: skip
    print(markdown(["situation", "plan", "devices", "predicted tok/s", "achieved tok/s", "error"], detail))
    save("planner_live", {"dtype": args.dtype, "summary": summary, "detail": detail, "figures": figures})


if __name__ == "__main__":
    main()
