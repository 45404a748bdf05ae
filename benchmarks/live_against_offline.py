"""What works offline fails live: three policies on one layout, over arrival rates and all at once.

The first requests of a production trace, lengths scaled to the context, are served under `static` with an equal split
(the pre-training habit), `fcfs` with an equal split (today's engines) and `equal-time` with the default split. Live:
the trace's own arrivals, replayed faster and faster up to saturation. Offline: the same requests at once, to an engine
without a server. Figures are medians over the rounds; throughput ratios are to `fcfs` of the same round.
"""

import argparse
import shlex
from pathlib import Path
from statistics import median
from typing import Any

from common import SHARED, Target, alternate, bench, evener, load, markdown, ratios, save
from evener.workload.trace import read_trace

POLICIES = {
    "static, equal split": ("--policy", "static", "--split", "equal"),
    "fcfs, equal split": ("--policy", "fcfs", "--split", "equal"),
    "equal-time, default split": ("--policy", "equal-time", "--split", "time"),
}
BASELINE = "fcfs, equal split"
KEYS = ("output_tok_s", "goodput_req_s", "ttft_p50", "ttft_p90", "ttft_p99", "tpot_p50", "tpot_p90", "tpot_p99")


def flat(figures: dict[str, Any]) -> dict[str, Any]:
    """Percentiles of TTFT and TPOT (ms) beside the other figures."""
    picked = {f"{m}_{p}": figures[f"{m}_ms"][p] for m in ("ttft", "tpot") for p in ("p50", "p90", "p99")}
    return {**figures, **picked}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=str(SHARED / "traces" / "azure2023_conv.csv"))
    parser.add_argument("--requests", type=int, default=300)
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--rates", default="0.25,0.5,1,2", help="mean arrivals per second, comma-separated")
    parser.add_argument("--slo", default="ttft=2s,tpot=200ms", help="for goodput")
    parser.add_argument("--layout", default="--devices 'cpu:0 cpu:1' -pp 2", help="flags of the engine")
    parser.add_argument("--model", help="path; default: that of evener serve")
    parser.add_argument("--rounds", type=int, default=1)
    args = parser.parse_args()

    own_rate = read_trace(Path(args.trace)).first(args.requests).mean_rate()
    rates = [float(x) for x in args.rates.split(",")]
    traffic = (
        "--trace",
        args.trace,
        "--requests",
        str(args.requests),
        "--context",
        str(args.context),
        "--warm-up",
        "4",
    )
    layout = [*shlex.split(args.layout), "--max-model-len", str(args.context)]

    def live(target: Target, url: str) -> dict[float, dict[str, Any]]:
        scale = {rate: ("--rate-scale", str(rate / own_rate)) for rate in rates}
        return {rate: flat(load(url, *traffic, *scale[rate], "--slo", args.slo)) for rate in rates}

    def offline(target: Target, url: str) -> dict[str, Any]:
        where = ([args.model] if args.model else []) + layout
        return flat(bench("--offline", *where, *POLICIES[target.name], *traffic, "--rate", "inf", "--slo", args.slo))

    servers = [evener(name, *layout, *flags, model=args.model) for name, flags in POLICIES.items()]
    alive = alternate(servers, args.rounds, live)
    batch = alternate([Target(name, url="offline") for name in POLICIES], args.rounds, offline)

    by_case: dict[str, dict[str, list[dict[str, Any]]]] = {"offline": batch}
    for rate in rates:
        by_case[f"{rate:g} req/s"] = {name: [r[rate] for r in rounds] for name, rounds in alive.items()}
    rows = []
    for case, results in by_case.items():
        relative = ratios(results, "output_tok_s", BASELINE)
        rows += [[case, n, *(median(r[k] for r in rs) for k in KEYS), relative[n]] for n, rs in results.items()]
    print(markdown(["arrivals", "policy", *KEYS, f"x {BASELINE}"], rows))
    save("live_against_offline", {"layout": layout, "slo": args.slo, "cases": by_case})


if __name__ == "__main__":
    main()
