"""Two corners of `compounding.py` on real workers: none of the four challenges, and all of them at once.

The habits of pre-training again (two pipeline stages of equal layers, `fcfs`), now with the model of the package in
int8 over two cores: fixed lengths at even gaps on equal devices, against log-normal lengths in bursts on speeds 1 and
1/2 with a delay of 2 ms between the stages. The rate is a fixed share of what the simulator says the undisturbed plan
serves. Every corner is also simulated, and so are the single challenges, so that what they add alone can be summed.

    python benchmarks/compounding_live.py [--requests 96] [--rounds 2]
"""

import argparse
import itertools
import sys
from collections.abc import Iterable
from statistics import median
from typing import Any

import numpy as np

from common import markdown, save
from compounding import FACTORS, lengths
from evener.api import EngineOptions, Prepared, make_options, prepare
from evener.ledger.causes import USEFUL, Cause
from evener.spec.cluster import Link
from evener.units import Seconds
from evener.workload.arrivals import gamma
from evener.workload.compare import warm_up_of
from evener.workload.rehearse import Rehearsal, run_live, simulate
from evener.workload.requests import TimedRequest

INPUT, OUTPUT, LONGEST = 120, 40, 1000
LOAD = 0.5
"""Of what the undisturbed plan serves: with a device of half the speed there is just enough left."""
SEED = 7


def engine(on: frozenset[str]) -> EngineOptions:
    """The plan is the same in every corner; what differs is the devices and their link."""
    return make_options(
        devices=("cpu:0", "cpu:1,slowdown=2" if "devices" in on else "cpu:1"),
        links=(Link("cpu:0", "cpu:1", Seconds(2e-3)),) if "link" in on else (),
        pipeline_parallel_size=2, split="equal", policy="fcfs", dtype="int8", max_model_len=2 * LONGEST,
        max_num_seqs=32, max_num_batched_tokens=512, kv_cache_memory="512MiB",
    )  # fmt: skip


def traffic(on: frozenset[str], count: int, rate: float) -> list[TimedRequest]:
    """As many tokens at the same mean rate in every corner, but for a few that the context cuts."""
    rng, words = np.random.default_rng(SEED), np.random.default_rng(SEED + 1)
    inputs, outputs = (
        [min(LONGEST, n) for n in lengths(mean, count, "lengths" in on, rng)] for mean in (INPUT, OUTPUT)
    )
    times = gamma(count, rate, 0.1 if "bursts" in on else np.inf, np.random.default_rng(SEED + 2))
    times *= (count / rate) / times[-1]
    return [
        TimedRequest(k, float(t), words.integers(100, 32_000, n).tolist(), n, m)
        for k, (t, n, m) in enumerate(zip(times, inputs, outputs, strict=True))
    ]


def loss(run: Rehearsal) -> tuple[float, dict[str, float]]:
    """Share of the device time lost while there is work, whole and by cause."""
    total = run.account.total
    busy = 1 - total.share(Cause.NO_DEMAND)
    parts = {c.label: total.share(c) / busy for c in Cause if c not in USEFUL and c != Cause.NO_DEMAND}
    return sum(parts.values()), parts


def figures(runs: Iterable[Rehearsal]) -> dict[str, Any]:
    """Medians over runs of one corner."""
    found = list(runs)
    losses = [loss(r) for r in found]
    return {
        "lost": median(whole for whole, _ in losses),
        "losses": {name: median(parts[name] for _, parts in losses) for name in losses[0][1]},
        "mean_e2e_ms": median(r.report.e2e_ms.mean or 0.0 for r in found),
        "ttft_p90_ms": median(r.report.ttft_ms.p90 or 0.0 for r in found),
        "tpot_p90_ms": median(r.report.tpot_ms.p90 or 0.0 for r in found),
    }


def served(prepared: Prepared, requests: list[TimedRequest]) -> Rehearsal:
    """One live run."""
    run = run_live(prepared, requests, warm_up_of(requests, 4))
    if run.report.failed:
        raise SystemExit(f"{run.report.failed} requests failed: {run.report.failures}")
    return run


def row(name: str, where: str, got: dict[str, Any], added: float, base: dict[str, Any]) -> list[object]:
    """One line of the table."""
    largest = sorted(got["losses"].items(), key=lambda x: -x[1])[:3]
    return [
        name, where, f"{100 * got['lost']:.1f}", f"{100 * added:.1f}",
        ", ".join(f"{cause} {100 * share:.1f}" for cause, share in largest if share > 0.001),
        f"{got['mean_e2e_ms'] / base['mean_e2e_ms']:.2f}", got["ttft_p90_ms"], got["tpot_p90_ms"],
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    none, everything = frozenset[str](), frozenset(FACTORS)
    at_once = simulate(prepare(engine(none)), traffic(none, args.requests, 1e6))
    rate = LOAD * args.requests / at_once.report.duration_s
    corners = {on: prepare(engine(on)) for on in (none, *(frozenset({f}) for f in FACTORS), everything)}
    work = {on: traffic(on, args.requests, rate) for on in corners}
    simulated = {on: figures([simulate(corners[on], work[on])]) for on in corners}
    runs: dict[frozenset[str], list[Rehearsal]] = {none: [], everything: []}
    for r, on in itertools.product(range(args.rounds), runs):
        print(f"round {r + 1} of {args.rounds}: {' + '.join(sorted(on)) or 'none'}", file=sys.stderr, flush=True)
        runs[on].append(served(corners[on], work[on]))
    live = {on: figures(found) for on, found in runs.items()}
    base = simulated[none]["lost"]
    added = base + sum(simulated[frozenset({f})]["lost"] - base for f in FACTORS)
    rows = []
    for on in corners:
        name = " + ".join(f for f in FACTORS if f in on) or "none"
        alone = added if on == everything else simulated[on]["lost"]
        rows.append(row(name, "simulated", simulated[on], alone, simulated[none]))
        if on in live:
            rows.append(row(name, "live", live[on], alone, live[none]))
    head = ("factors", "", "lost, %", "if effects added, %", "largest causes, %", "e2e, times", "TTFT p90, ms",
            "TPOT p90, ms")  # fmt: skip
    print(f"{rate:.2f} requests per second\n")
    print(markdown(head, rows))
    named = {" + ".join(sorted(on)) or "none": on for on in corners}
    save("compounding_live", {
        "rate": rate, "added": added, "simulated": {n: simulated[on] for n, on in named.items()},
        "live": {n: live[on] for n, on in named.items() if on in live},
    })  # fmt: skip


if __name__ == "__main__":
    main()
