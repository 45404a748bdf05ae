"""Workload W: 64 requests at once, 15,793 prompt and 8,328 output tokens; output tokens/s by layout, beside peers.

Prompts are lognormal (median 180, 16 to 1,000 tokens), outputs lognormal (median 100, 8 to 400), random token ids,
greedy, exact lengths. Evener runs as one process on one core, one process on two, tensor, pipeline and data
parallel; a peer is any server with OpenAI's /v1/completions:

    benchmarks/workload_w.py --rounds 3 --peer 'vllm=vllm serve MODEL --port {port} --dtype bfloat16'
"""

import argparse
import shlex
from collections import Counter
from statistics import median
from typing import Any

from common import Target, alternate, evener, load, markdown, peer, ratios, save
from evener.workload.traffic import Traffic, make_requests

REQUESTS, PROMPT_TOKENS, OUTPUT_TOKENS = 64, 15_793, 8_328
SHAPE = ("--input-tokens", "lognormal:180:0.8:16:1000", "--output-tokens", "lognormal:100:0.7:8:400")
IDS = ("--token-ids", "100:40000")
W = ("--requests", str(REQUESTS), *SHAPE, *IDS, "--seed", "0")


def workload(k: int) -> tuple[str, ...]:
    """W with every token id k higher: the same lengths, and no prefix that an earlier round has left in a cache."""
    return (*W[: -len(IDS) - 2], "--token-ids", f"{100 + k}:{40000 + k}", "--seed", "0")


KEYS = ("output_tok_s", "duration_s", "ttft_p50_ms", "tpot_p50_ms", "client_cpu_s")


def totals() -> tuple[int, int]:
    """Prompt and output tokens of the list that `evener bench` makes from the flags `W`."""
    traffic = Traffic(requests=REQUESTS, input_tokens=SHAPE[1], output_tokens=SHAPE[3], token_ids=IDS[1])
    requests = make_requests(traffic)
    return sum(r.input_tokens for r in requests), sum(r.output_tokens for r in requests)


_rounds: Counter[str] = Counter()


def measure(target: Target, url: str) -> dict[str, Any]:
    """Warm the server up, then run W once."""
    _rounds[target.name] += 1
    got = load(url, *workload(_rounds[target.name]), "--warm-up", "16", model=target.model)
    served = got["input_tokens"], got["output_tokens"]
    assert served == (PROMPT_TOKENS, OUTPUT_TOKENS), f"{target.name} counted {served} tokens: not the same workload"
    return {**got, "ttft_p50_ms": got["ttft_ms"]["p50"], "tpot_p50_ms": got["tpot_ms"]["p50"]}


def targets(two: str, one: str, both: str, dtypes: list[str], model: str | None, extra: list[str]) -> list[Target]:
    """Evener's layouts on two devices, and on the same cores as one device, in each dtype; fp32 is not named."""
    layouts = {
        "one core": ("--devices", one),
        "one process": ("--devices", both),
        "tp2": ("--devices", two, "-tp", "2"),
        "pp2": ("--devices", two, "-pp", "2"),
        "dp2": ("--devices", two, "-dp", "2"),
    }
    return [
        evener(name if dtype == "fp32" else f"{name} {dtype}", *flags, "--dtype", dtype, *extra, model=model)
        for dtype in dtypes
        for name, flags in layouts.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", help="path; default: that of evener serve")
    parser.add_argument("--devices", default="cpu:0 cpu:1", help="the two devices of tp2, pp2 and dp2")
    parser.add_argument("--one", default="cpu:0", help="the device of `one core`")
    parser.add_argument("--both", default="cpu:0-1", help="the device of `one process`: all cores of the two")
    parser.add_argument("--dtypes", default="fp32", help="comma-separated, of Evener's layouts")
    parser.add_argument("--serve-args", default="", help="more flags for every evener serve")
    parser.add_argument("--only", help="comma-separated names of layouts to run")
    parser.add_argument("--peer", action="append", default=[], help="NAME=URL or NAME='command ... {port}'")
    parser.add_argument("--baseline", help="name that ratios refer to (default: the first)")
    parser.add_argument("--keep", action="store_true", help="start all servers once and keep them (slow starters)")
    args = parser.parse_args()

    assert totals() == (PROMPT_TOKENS, OUTPUT_TOKENS), f"the generator has changed: {totals()}"
    dtypes = [x.strip() for x in args.dtypes.split(",")]
    chosen = targets(args.devices, args.one, args.both, dtypes, args.model, shlex.split(args.serve_args))
    if args.only is not None:
        wanted = [x.strip() for x in args.only.split(",") if x.strip()]
        unknown = set(wanted) - {t.name for t in chosen}
        if unknown:
            parser.error(f"--only {', '.join(sorted(unknown))}: layouts are {', '.join(t.name for t in chosen)}")
        chosen = [t for t in chosen if t.name in wanted]
    chosen += [peer(spec) for spec in args.peer]
    baseline = args.baseline or (chosen[0].name if chosen else "")
    if baseline not in {t.name for t in chosen}:
        parser.error(f"--baseline {baseline!r} is not among {', '.join(t.name for t in chosen)}")

    results = alternate(chosen, args.rounds, measure, args.keep)
    relative = ratios(results, "output_tok_s", baseline)
    rows = [[t.name, *(median(r[k] for r in results[t.name]) for k in KEYS), relative[t.name]] for t in chosen]
    print(markdown(["layout", *KEYS, f"x {baseline}"], rows))
    commands = {t.name: t.url or shlex.join(t.command) for t in chosen}
    save("workload_w", {"baseline": baseline, "ratio": relative, "commands": commands, "rounds": results})


if __name__ == "__main__":
    main()
