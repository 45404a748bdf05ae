"""The README's first figure: static batches on an equal plan against Evener's default, the ledgers side by side, live.

Two unlike devices (the second declared half as fast), one trace of production traffic with all requests at once. Three
ways to serve it, tensor parallel, on the same kernels: the pre-training habit (equal shards, static padded batches),
today's engines (equal shards, continuous batching), and Evener (heads and columns split by time, equal-time batches).
"""

import argparse
import sys
from pathlib import Path

import msgspec

from common import ROOT, SHARED, markdown, save
from evener.api import make_options
from evener.cli.paths import check_picture
from evener.spec.cluster import parse_device
from evener.workload.bars import plot_ledgers
from evener.workload.compare import Case, compare, requests_of, warm_up_of
from evener.workload.spec import parse_traffic
from evener.workload.table import table

PICTURE = ROOT / "docs" / "images" / "static-against-evener.png"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trace", default=str(SHARED / "traces" / "azure2023_conv.csv"))
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--devices", default="cpu:0 cpu:1,slowdown=2")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--simulate", action="store_true", help="predict it instead; nothing is saved but the picture")
    args = parser.parse_args()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    check_picture(args.picture, "--picture")

    trace = f"trace={args.trace},requests={args.requests},context={args.context}"
    requests = [msgspec.structs.replace(r, arrival_s=0.0) for r in requests_of(parse_traffic(trace))]
    mean_in = sum(r.input_tokens for r in requests) / len(requests)
    mean_out = sum(r.output_tokens for r in requests) / len(requests)
    common = {
        "devices": tuple(args.devices.split()), "tensor_parallel_size": 2, "max_model_len": args.context,
        "traffic_mix": f"in={mean_in:.0f},out={mean_out:.0f}",
    }  # fmt: skip
    cases = [
        Case("static batches, equal shards", make_options(**common, policy="static", split="equal", static_batch=16)),
        Case("continuous batching, equal shards", make_options(**common, policy="fcfs", split="equal")),
        Case("Evener", make_options(**common, policy="equal-time", split="time")),
    ]
    results = compare(
        cases, requests, live=not args.simulate, rounds=args.rounds, warm_up=warm_up_of(requests, 4),
        progress=lambda text: print(text, file=sys.stderr, flush=True),
    )  # fmt: skip
    print(markdown(["", *(r.name for r in results)], [[what, *cells] for what, cells in table(results)]))
    how = "Simulated" if args.simulate else "Live"
    plot_ledgers(
        [(f"{r.name}: {r.report.output_tok_s:.0f} tok/s", r.account) for r in results], args.picture,
        "The same requests on the same two devices: where every device-second goes",
        f"{how}: SmolLM2-135M, tensor parallel on {args.devices}; the first {args.requests} requests of the Azure 2023 "
        "conversation trace, all at once.",
        {d.name: f"{d.name}, {1 / d.slowdown:.0%} speed" for d in map(parse_device, args.devices.split())},
    )  # fmt: skip
    print(f"wrote {args.picture}", file=sys.stderr)
    if not args.simulate:
        save(
            "first_figure",
            {"settings": vars(args) | {"picture": str(args.picture)}, "cases": msgspec.to_builtins(results)},
        )


if __name__ == "__main__":
    main()
