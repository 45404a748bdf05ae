"""The planner against exhaustive search on random clusters of 2 to 5 devices.

The exhaustive search (tests/plan/problems.py) tries every set of disjoint replicas, every order of stages and every
split of the layers of a small model; both score plans with the same cost model. Speeds differ up to eight times, half
of the clusters have too little memory for the whole model on one device.
"""

import argparse
import random
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tests.plan.problems import best_of_all, make_problem, random_situation

from common import markdown, save
from evener.errors import InvalidPlan
from evener.plan.search import search


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clusters", type=int, default=100)
    parser.add_argument("--devices", type=int, default=5, help="at most")
    parser.add_argument("--roofline", action="store_true", help="score with the roofline model (slower)")
    args = parser.parse_args()
    rows, worse = [], []
    for seed in range(args.clusters):
        situation = random_situation(random.Random(1000 + seed), args.devices)
        problem = make_problem(situation, simple=not args.roofline)
        began = time.process_time()
        try:
            found = search(problem)[0].load.requests_s
        except InvalidPlan:
            found = 0.0
        between = time.process_time()
        best = best_of_all(problem)
        ended = time.process_time()
        ratio = found / best if best else 1.0
        rows.append((seed, len(situation.slowdowns), found, best, ratio, between - began, ended - between))
        if ratio < 1 - 1e-9:
            worse.append(seed)
        print(f"{seed}: {len(situation.slowdowns)} devices, {found:.6g} of {best:.6g}", file=sys.stderr, flush=True)
    table = []
    for n in sorted({r[1] for r in rows}):
        own = [r for r in rows if r[1] == n]
        table.append(
            [n, len(own), sum(r[3] == 0 for r in own), sum(r[4] >= 1 - 1e-9 for r in own), min(r[4] for r in own),
             max(r[4] for r in own), sum(r[5] for r in own) / len(own), sum(r[6] for r in own) / len(own)]
        )  # fmt: skip
    headers = ["devices", "clusters", "nothing fits", "equal or better", "least ratio", "greatest ratio", "search s",
               "exhaustive s"]  # fmt: skip
    print(markdown(headers, table))
    save("planner_exhaustive", {"rows": rows, "worse": worse, "roofline": args.roofline})
    if worse:
        raise SystemExit(f"worse than exhaustive search on seeds {worse}")


if __name__ == "__main__":
    main()
