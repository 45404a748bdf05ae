"""Unlike devices add up: throughput together over the sum of what each does alone.

Devices of speed 1 and 1/2, and 1, 1/2 and 1/4 (declared slow-downs), under the planner's layout and under the equal
splits of training. An equal split over speeds 1 and 1/2 reaches at best two thirds of the sum. Every engine is kept
full (twice as many requests outstanding as its rows), and once it has settled the tokens of prompts and answers are
counted for `--seconds`: neither filling nor draining counts, from which devices together would suffer more, and a
window with longer prompts than another is worth as much. Rounds alternate; medians are quoted. `idle`: the share of the
devices' time that computed nothing, by the ledger of the last round.
"""

import argparse
import asyncio
import itertools
import json
import random
import sys
import time
from contextlib import aclosing
from dataclasses import replace
from statistics import median
from typing import Any, cast

from common import markdown, save
from evener.api import start_engine
from evener.engine.request import Request, SamplingParams
from evener.plan.baselines import score_usual
from evener.plan.more import only
from evener.plan.planner import choose_plan
from evener.plan.problem import Problem
from evener.plan.search import Scored, search
from evener.plan.trial import try_plan
from planner_live import CHAT, MAX_SEQS, Situation, engine_options, in_child, problem_of

GROUPS = (
    Situation("1 and 1/2", ("cpu:0", "cpu:1,slowdown=2"), CHAT),
    Situation("1, 1/2 and 1/4", ("cpu:0", "cpu:1,slowdown=2", "cpu:1#1,slowdown=4"), CHAT),
)
WARM_S = 10.0
COMPUTING = ("prefill", "decode")


def measure(s: Situation, scored: Scored, problem: Problem, seconds: float) -> dict[str, Any]:
    """A full engine in a process of its own: tokens of prompts and answers per second, causes of its devices' time."""
    return in_child(__file__, s, scored, problem, replicas=len(scored.plan.replicas), seconds=seconds)


async def child(job: dict[str, Any]) -> None:
    """Keep an engine full, and print what it does in the middle of that."""
    rng = random.Random(0)
    engine = await start_engine(**engine_options(job))
    items = itertools.cycle(job["items"])
    lengths = [m for _, m in job["items"]]
    counted = sent = 0
    rows = MAX_SEQS * job["replicas"]
    over = asyncio.Event()

    async def client() -> None:
        nonlocal counted, sent
        while not over.is_set():
            sent += 1
            n, m = next(items)
            if sent <= rows:  # what fills the rows at first is at any point of a long answer sooner than of a short
                n, m = 16, rng.randrange(1, rng.choices(lengths, lengths)[0] + 1)
            prompt = [rng.randrange(100, 32_000) for _ in range(n)]
            sampling = SamplingParams(temperature=0.0)
            request = Request(f"r{sent}", n, m, prompt, sampling=sampling)
            async with aclosing(cast(Any, engine.submit(request))) as answers:
                async for answer in answers:
                    counted += answer.count + n
                    n = 0  # the prompt counts once, with its first token
                    if over.is_set():
                        return

    clients = [asyncio.create_task(client()) for _ in range(2 * rows)]
    await asyncio.sleep(WARM_S)
    begin, before, first = time.monotonic(), counted, engine.ledger().account()
    await asyncio.sleep(job["seconds"])
    tokens_s = (counted - before) / (time.monotonic() - begin)
    last = engine.ledger().account()
    over.set()
    await asyncio.gather(*clients)
    await engine.close()
    causes = {
        d: {c: now - first.devices[d].causes[c] for c, now in use.causes.items()} for d, use in last.devices.items()
    }
    print(json.dumps({"tokens_s": tokens_s, "causes": causes}))


def idle(causes: dict[str, dict[str, float]], devices: int) -> float:
    """Share of all devices' time, of those left out as well, in which nothing was computed that was asked for."""
    whole = max(sum(c.values()) for c in causes.values()) * devices
    return 1 - sum(c.get(name, 0.0) for c in causes.values() for name in COMPUTING) / whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--only", help="comma-separated numbers of groups, from 0")
    parser.add_argument("--requests", type=int, default=96, help="that the planner is told, and that are sent in turn")
    parser.add_argument("--seconds", type=float, default=24.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="int8", help="of weights and KV cache")
    args = parser.parse_args()
    if args.child:
        asyncio.run(child(json.loads(args.child)))
        return
    table, figures = [], {}
    for s in [GROUPS[int(k)] for k in args.only.split(",")] if args.only else GROUPS:
        problem = replace(problem_of(s, args.requests, args.dtype), finite=False)
        choice = choose_plan(problem)
        plans: dict[str, Scored] = {"planner": Scored(choice.best.plan, choice.best.load)}
        plans |= {name: found for name, found in score_usual(problem) if isinstance(found, Scored)}
        alone = [d.name for d in problem.cluster.devices]
        plans |= {name: search(only(problem, [name]))[0] for name in alone}
        whole = 1 + problem.demand.input_tokens / problem.demand.output_tokens
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in plans}
        names = list(plans)
        for r in range(args.rounds):
            for k in range(len(names)):
                name = names[(k + r) % len(names)]
                runs[name].append(measure(s, plans[name], problem, args.seconds))
                text = f"{s.name}: round {r + 1}, {name}: {runs[name][-1]['tokens_s']:.0f} tok/s"
                print(text, file=sys.stderr, flush=True)
        rates = {name: [run["tokens_s"] for run in runs[name]] for name in names}
        sums = [sum(rates[name][r] for name in alone) for r in range(args.rounds)]
        for name in names:
            share = median(x / total for x, total in zip(rates[name], sums, strict=True))
            shape = choice.best.plan.name if name == "planner" else ""
            output = try_plan(problem, plans[name], choice.items).full_tokens_s
            there = 1 if name in alone else len(s.devices)
            nothing = f"{100 * idle(runs[name][-1]['causes'], there):.1f}%"
            table.append([s.name, name, shape, output * whole, median(rates[name]), share, nothing])
        figures[s.name] = {"runs": runs, "plan": choice.best.plan.name}
    head = ["speeds", "layout", "", "predicted tok/s", "tok/s", "over the sum of each alone", "idle"]
    print(markdown(head, table))
    save("planner_unlike", {"dtype": args.dtype, "seconds": args.seconds, "groups": figures})


if __name__ == "__main__":
    main()
