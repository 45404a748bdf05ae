"""Do the challenges of live traffic compound? Length variance x burstiness x unequal devices x link delay, on one plan.

A factorial run in the simulator: every one of the 16 combinations serves the same number of tokens at the same mean
rate with the same plan (two pipeline stages of two tensor-parallel ranks, equal split, `fcfs`: the habits of
pre-training). What a combination loses is the share of device time that computes nothing useful while there is work
(all causes but useful ones and `no_demand`); were the effects independent, shares lost would add up. What its users
feel is the mean time to the last token over that of the undisturbed run; independent effects would multiply.

    python benchmarks/compounding.py [--requests 600] [--figure docs/images/compounding.png]
"""

import argparse
import itertools
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, markdown, save
from evener.brain import Brain, BrainConfig
from evener.cli.paths import check_picture
from evener.cost.published import cluster_profile
from evener.cost.rates import bind
from evener.cost.roofline import RooflineCostModel
from evener.engine.request import Request
from evener.execute.sim.body import Simulator
from evener.execute.sim.figures import Figures
from evener.execute.sim.traffic import SimRequest
from evener.ledger.causes import N_CAUSES, USEFUL, Cause
from evener.ledger.colours import COLOURS
from evener.ledger.ledger import Ledger
from evener.pictures import new_figure, save_figure
from evener.plan.default import equal_plan
from evener.spec.cluster import Cluster, Device, Link
from evener.spec.model import ModelSpec
from evener.spec.peaks import published
from evener.units import Nanoseconds, Seconds, ns
from evener.workload.arrivals import gamma

FACTORS = ("lengths", "bursts", "devices", "link")
"""Lengths vary (log-normal, sigma 1, instead of fixed); arrivals come in bursts (Gamma shape 0.1 instead of even gaps);
one device of the four takes twice as long; the link between the stages has a delay of 2 ms instead of none."""
LLAMA_3_8B = ModelSpec(
    "llama", vocab=128_256, hidden=4096, layers=32, heads=32, kv_heads=8, head_dim=128, ffn=14_336, max_position=8192
)
INPUT, OUTPUT, SIGMA = 600, 200, 1.0
RATE = 12.0
"""Requests per second: about 70% of what the plan serves with none of the factors."""
KV_BLOCKS = 4_000
SLO_TTFT, SLO_TPOT = 1.0, 0.05


def lengths(mean: int, n: int, vary: bool, rng: np.random.Generator) -> list[int]:
    """`n` lengths whose sum is `n * mean`, nearly: all equal, or log-normal."""
    if not vary:
        return [mean] * n
    drawn = np.clip(rng.lognormal(np.log(mean) - SIGMA**2 / 2, SIGMA, n), 1, 12 * mean)
    return [max(1, int(x)) for x in np.rint(drawn * (mean * n / drawn.sum()))]


def run(on: frozenset[str], requests: int) -> dict[str, Any]:
    """One combination."""
    sheet = published("a100_sxm_80gb")
    devices = tuple(
        Device(f"cuda:{k}", "cuda", index=k, peaks=sheet, memory=sheet.memory,
               slowdown=2.0 if k == 3 and "devices" in on else 1.0)
        for k in range(4)
    )  # fmt: skip
    links = tuple(Link(a, b, Seconds(2e-3)) for a in ("cuda:0", "cuda:1") for b in ("cuda:2", "cuda:3"))
    cluster = Cluster(devices, links if "link" in on else ())
    plan = equal_plan(LLAMA_3_8B, devices, 2, 2, 1)
    profile = bind(cluster_profile(cluster), devices)
    costs = RooflineCostModel(LLAMA_3_8B, plan, profile, dtype="fp16", kv_dtype="fp16", links=cluster.links)
    ledger = Ledger(plan, costs, start=Nanoseconds(0))
    config = BrainConfig(policy="fcfs", max_num_seqs=64, max_num_batched_tokens=512, max_queue=1 << 40)
    rng = np.random.default_rng(7)
    inputs = lengths(INPUT, requests, "lengths" in on, rng)
    outputs = lengths(OUTPUT, requests, "lengths" in on, rng)
    times = gamma(requests, RATE, 0.1 if "bursts" in on else np.inf, np.random.default_rng(8))
    times *= (requests / RATE) / times[-1]  # the same mean rate in every combination
    traffic = (
        SimRequest(Request(f"q{k}", i, o), ns(float(t)), o)
        for k, (t, i, o) in enumerate(zip(times, inputs, outputs, strict=True))
    )
    figures = Figures(ttft_ns=SLO_TTFT * 1e9, tpot_ns=SLO_TPOT * 1e9)
    Simulator(
        Brain(plan, [KV_BLOCKS], costs, config, journal=ledger), costs, traffic, ledger=ledger, on_end=figures
    ).run()
    report, total = figures.report(), ledger.account().total
    idle = total.share(Cause.NO_DEMAND)
    losses = {c.label: total.share(c) / (1 - idle) for c in Cause if c not in USEFUL and c != Cause.NO_DEMAND}
    assert len(losses) + len(USEFUL) + 1 == N_CAUSES
    return {
        "lost": sum(losses.values()),
        "losses": losses,
        "no_demand": idle,
        "device_seconds": total.wall_s,
        "p90_ttft_ms": report.ttft_ms.p90,
        "p90_tpot_ms": report.tpot_ms.p90,
        "mean_e2e_ms": report.e2e_ms.mean,
        "met": report.met,
        "completed": report.completed,
    }


def figure(results: dict[frozenset[str], dict[str, Any]], path: Path) -> None:
    """Stacked causes of every combination, and where the sum of the single effects would be."""
    names = list(results)
    shown = [c for c in Cause if any(r["losses"].get(c.label, 0) > 0.004 for r in results.values())]
    picture = new_figure(10, 5.2, layout="constrained")
    axes = picture.add_subplot()
    below = np.zeros(len(names))
    for cause in shown:
        part = np.array([100 * results[n]["losses"][cause.label] for n in names])
        axes.bar(range(len(names)), part, bottom=below, label=cause.label, color=COLOURS[cause], width=0.75)
        below += part
    sums = [100 * added(results, n) for n in names]
    axes.scatter(range(len(names)), sums, marker="_", s=420, color="black", label="sum of the single effects", zorder=3)
    axes.set_xticks(range(len(names)), [" +\n".join(f for f in FACTORS if f in n) or "none" for n in names], fontsize=7)
    axes.set_ylabel("device time lost while there is work, %")
    axes.set_title("Each challenge alone, and together: two stages of two ranks, equal split, fcfs (simulated)")
    axes.legend(fontsize=8, ncols=2)
    save_figure(picture, path, "--figure", dpi=130)
    print(f"wrote {path}", file=sys.stderr)


def added(results: dict[frozenset[str], dict[str, Any]], on: frozenset[str]) -> float:
    """What a combination would lose if every factor in it added what it adds alone."""
    base: float = results[frozenset()]["lost"]
    return base + sum(results[frozenset({f})]["lost"] - base for f in on)


def slower(results: dict[frozenset[str], dict[str, Any]], on: frozenset[str]) -> float:
    """Mean end-to-end time over that without any factor."""
    ratio: float = results[on]["mean_e2e_ms"] / results[frozenset()]["mean_e2e_ms"]
    return ratio


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=600)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "images" / "compounding.png")
    args = parser.parse_args()
    args.figure.parent.mkdir(exist_ok=True)
    check_picture(args.figure, "--figure")
    combinations = [frozenset(c) for n in range(len(FACTORS) + 1) for c in itertools.combinations(FACTORS, n)]
    results = {on: run(on, args.requests) for on in combinations}
    rows = []
    for on, r in results.items():
        largest = sorted(r["losses"].items(), key=lambda x: -x[1])[:3]
        rows.append(
            (
                " + ".join(f for f in FACTORS if f in on) or "none", f"{100 * r['lost']:.1f}",
                f"{100 * added(results, on):.1f}", f"{100 * (r['lost'] - added(results, on)):+.1f}",
                ", ".join(f"{name} {100 * share:.1f}" for name, share in largest if share > 0.001),
                f"{slower(results, on):.2f}", f"{math.prod(slower(results, frozenset({f})) for f in on):.2f}",
                r["p90_ttft_ms"], r["p90_tpot_ms"], f"{100 * r['met']:.0f}",
            )
        )  # fmt: skip
    headers = ("factors", "lost, %", "if effects added", "beyond that", "largest causes, %", "e2e, times",
               "if multiplied", "TTFT p90, ms",
               "TPOT p90, ms", "in SLO, %")  # fmt: skip
    print(markdown(headers, rows))
    save("compounding", {"results": {" + ".join(sorted(on)) or "none": r for on, r in results.items()}})
    figure(results, args.figure)
    return 0


if __name__ == "__main__":
    sys.exit(main())
