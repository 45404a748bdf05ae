"""Unlike devices add up: throughput together over the sum of what each does alone.

Devices of speed 1 and 1/2, and 1, 1/2 and 1/4 (declared slow-downs), under the planner's layout and under the equal
splits of training. An equal split over speeds 1 and 1/2 reaches at best two thirds of the sum. All requests at once,
rounds alternate, medians are quoted.
"""

import argparse
import sys
from statistics import median

from common import markdown, save
from evener.plan.baselines import score_usual
from evener.plan.more import only
from evener.plan.planner import choose_plan
from evener.plan.search import Scored, search
from planner_live import CHAT, Situation, measure, problem_of

GROUPS = (
    Situation("1 and 1/2", ("cpu:0", "cpu:1,slowdown=2"), CHAT),
    Situation("1, 1/2 and 1/4", ("cpu:0", "cpu:1,slowdown=2", "cpu:1#1,slowdown=4"), CHAT),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="int8", help="of weights and KV cache")
    args = parser.parse_args()
    table, figures = [], {}
    for s in GROUPS:
        problem = problem_of(s, args.requests, args.dtype)
        choice = choose_plan(problem)
        plans: dict[str, Scored] = {"planner": Scored(choice.best.plan, choice.best.load)}
        plans |= {name: found for name, found in score_usual(problem) if isinstance(found, Scored)}
        alone = [d.name for d in problem.cluster.devices]
        plans |= {name: search(only(problem, [name]))[0] for name in alone}
        runs: dict[str, list[float]] = {name: [] for name in plans}
        names = list(plans)
        for r in range(args.rounds):
            for k in range(len(names)):
                name = names[(k + r) % len(names)]
                print(f"{s.name}: round {r + 1}, {name}", file=sys.stderr, flush=True)
                runs[name].append(measure(s, plans[name], problem))
        sums = [sum(runs[name][r] for name in alone) for r in range(args.rounds)]
        for name in names:
            share = median(x / total for x, total in zip(runs[name], sums, strict=True))
            shape = choice.best.plan.name if name == "planner" else ""
            table.append([s.name, name, shape, median(runs[name]), share])
        figures[s.name] = {"runs": runs, "plan": choice.best.plan.name, "predicted": choice.best.tokens_s}
    print(markdown(["speeds", "layout", "", "tok/s", "over the sum of each alone"], table))
    save("planner_unlike", {"dtype": args.dtype, "groups": figures})


if __name__ == "__main__":
    main()
