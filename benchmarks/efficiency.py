"""What parallelism brings on these cores: layouts of two devices against one, at constant concurrency per device.

    benchmarks/efficiency.py [--dtype int8] [--rounds 3] [--per-device 16]

Throughput: every device has as many requests of its own at once (prompts of 200 tokens, answers of 100), served by an
engine without a server; the client is this process, and its CPU time, with the control process's, stands beside. One
stream: a token's time against what the cost model, made of measured rates, says that it takes on this plan. Rounds
alternate; ratios are medians over them.
"""

import argparse
from statistics import median
from typing import Any

from common import markdown, save
from evener.cost.base import BatchShape
from steady import LAYOUTS, engine, equal, losses, run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-device", type=int, default=16)
    parser.add_argument("--layouts", default="one core,tp2,pp2,dp2,tp2 x pp2")
    args = parser.parse_args()
    names = [x.strip() for x in args.layouts.split(",")]
    prepared = {name: engine(name, args.dtype) for name in names}
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in names}
    for k in range(args.rounds):
        for name in (*names[k % len(names) :], *names[: k % len(names)]):
            print(f"round {k + 1}: {name}", flush=True)
            cores = len({d.partition("#")[0] for d in LAYOUTS[name]["devices"]})
            many = run(prepared[name], equal(3 * args.per_device * cores, 200, 100))
            alone = run(prepared[name], equal(1, 128, 192))
            shape = BatchShape(decode_rows=1, decode_context=224, sampled_rows=1)
            results[name].append(
                {
                    "tok_s": many.report.output_tok_s,
                    "client_cpu_share": many.report.client_cpu_s / (cores * many.report.duration_s),
                    "went": losses(many),
                    "alone_tok_s": 1e3 / alone.report.tpot_ms.p50,
                    "alone_went": losses(alone),
                    "of_bound": float(prepared[name].costs.batch_ns(0, shape)) / 1e6 / alone.report.tpot_ms.p50,
                }
            )
    rows = []
    for name in names:
        got = results[name]
        base = [r["tok_s"] for r in results[names[0]]]
        middle = {key: median(r[key] for r in got) for key in ("tok_s", "client_cpu_share", "alone_tok_s", "of_bound")}
        ratio = median(r["tok_s"] / b for r, b in zip(got, base, strict=True))
        rows.append(
            [
                name, middle["tok_s"], ratio, f"{100 * middle['client_cpu_share']:.1f}%", got[-1]["went"],
                middle["alone_tok_s"], f"{100 * middle['of_bound']:.0f}%", got[-1]["alone_went"],
            ]
        )  # fmt: skip
    table = ["layout", "tok/s", f"x {names[0]}", "client + control CPU", "where the time went", "one stream tok/s"]
    print(markdown([*table, "of its bound", "one stream: where"], rows))
    save("efficiency", {"dtype": args.dtype, "rounds": results})


if __name__ == "__main__":
    main()
