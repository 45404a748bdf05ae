"""Layouts of training under live traffic: the verdict of `evener plan --assess`, and the ledger that it rests on.

Five layouts of Llama-3-70B over two hosts of eight H100 under a rate and an objective, simulated; and two of the
packaged model over devices of speeds 1 and 1/2, simulated and then kept full live (`planner_unlike.py`), so that the
shares which the verdict quotes can be seen to occur.
"""

import argparse
import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from common import markdown, save
from evener.plan.assess import Assessment, assess, parse_layout
from evener.plan.planner import Choice, choose_plan
from evener.plan.problem import Problem
from evener.plan.search import score
from evener.planning import PlanOptions, make_problem
from planner_live import CHAT, Situation, problem_of
from planner_unlike import measure

LLAMA_3_70B = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128_256, "hidden_size": 8192,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 28_672,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "torch_dtype": "bfloat16",
}  # fmt: skip
CLUSTER = """
hosts:
  - name: dgx
    count: 2
    link: nvlink4
    devices:
      - {device: "cuda:0", profile: h100_sxm, count: 8, memory: 76GB}
links:
  - {between: [dgx-0, dgx-1], bandwidth: 400Gbit/s, latency: 3us}
"""
TRAFFIC, SLO = "rate=12,requests=400,in=lognormal:900:0.8:16:6000,out=lognormal:220:0.6:8:1500", "ttft=2s,tpot=60ms"
GPU_LAYOUTS = ("tp=8,pp=2", "tp=16", "pp=16", "tp=2,pp=2,dp=4", "tp=1,dp=16")
UNLIKE = Situation("speeds 1 and 1/2", ("cpu:0", "cpu:1,slowdown=2"), CHAT)
LIVE_LAYOUTS = ("tp=2", "pp=2")
GROUPS: Mapping[str, tuple[str, ...]] = {
    "useful": ("prefill", "decode"), "straggler": ("straggler",), "bubble": ("bubble",), "transfer": ("transfer",),
    "kv_starved": ("kv_starved",), "no_demand": ("no_demand",),
}  # fmt: skip


def gpus(folder: Path) -> Problem:
    """Two hosts that are not here, and a model that is a config.json alone."""
    config, cluster = folder / "config.json", folder / "cluster.yaml"
    config.write_text(json.dumps(LLAMA_3_70B))
    cluster.write_text(CLUSTER)
    return make_problem(PlanOptions(model=str(config), cluster=str(cluster), traffic=TRAFFIC, slo=SLO))


def shares(ledger: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of all devices' time, by group of causes; what is in none is `other`."""
    out = {
        name: sum(causes.get(c, 0.0) for causes in ledger.values() for c in members) / len(ledger)
        for name, members in GROUPS.items()
    }
    return {**out, "other": 1.0 - sum(out.values())}


def spread(ledger: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The shares as cells."""
    return [f"{100 * share:.1f}%" for share in shares(ledger).values()]


def judged(problem: Problem, layouts: tuple[str, ...], requests: int) -> tuple[Choice, list[Assessment]]:
    """The planner's choice, and the verdict on each layout beside it."""
    choice = choose_plan(problem, requests=requests)
    return choice, [assess(problem, parse_layout(text), choice.items, choice.best) for text in layouts]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--dtype", default="int8", help="of the live model")
    args = parser.parse_args()
    with TemporaryDirectory() as folder:
        choice, there = judged(gpus(Path(folder)), GPU_LAYOUTS, 400)
    problem = replace(problem_of(UNLIKE, 96, args.dtype), finite=False)
    own, here = judged(problem, LIVE_LAYOUTS, 400)
    words = [[a.layout, a.verdict, "; ".join(a.findings)] for a in [*there, *here]]
    table = []
    for where, best, found in (("16 x H100", choice.best, there), (UNLIKE.name, own.best, here)):
        tried = [(f"planner: {best.plan.name}", best), *((a.layout, a.tried) for a in found)]
        for name, t in tried:
            if t is not None:
                rate = t.full_tokens_s if found is here else t.tokens_s
                table.append([where, name, "simulated", rate, *spread(t.ledger)])
    live = {}
    for a in here:
        assert a.tried is not None, a.findings
        runs = []
        for r in range(args.rounds):
            print(f"{a.layout}: round {r + 1} of {args.rounds}", file=sys.stderr, flush=True)
            runs.append(measure(UNLIKE, score(problem, a.tried.plan), problem, args.seconds))
        # Tokens of answers alone, as in the simulation's column: prompts are a fixed share of what a full engine does.
        whole = 1 + problem.demand.input_tokens / problem.demand.output_tokens
        ledgers = [
            {d: {c: s / sum(causes.values()) for c, s in causes.items()} for d, causes in run["causes"].items()}
            for run in runs
        ]
        table.append(
            [UNLIKE.name, a.layout, "live", median(run["tokens_s"] for run in runs) / whole, *spread(ledgers[-1])]
        )
        live[a.layout] = {"simulated_full_tokens_s": a.tried.full_tokens_s, "runs": runs}
    print(markdown(["layout", "verdict", "findings"], words))
    print(markdown(["devices", "layout", "", "output tok/s", *GROUPS, "other"], table))
    save("planner_assess", {
        "traffic": TRAFFIC, "slo": SLO, "live": live,
        "assessed": [{"layout": a.layout, "verdict": a.verdict, "findings": a.findings,
                      "ledger": a.tried.ledger if a.tried else None} for a in [*there, *here]],
    })  # fmt: skip


if __name__ == "__main__":
    main()
