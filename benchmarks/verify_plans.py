"""Law 6 with the real model: every plan in every dtype against transformers, through the live path.

64 prompts of up to 160 tokens, 64 greedy tokens each, a quarter of them again (whole prefixes are then cached), with
a KV cache that forces preemption. fp32 must choose the same tokens; a narrower dtype stays within its bound on the KL
divergence and leaves the reference only at ties. See `evener verify` and `evener.verify`.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import msgspec

from common import markdown, save
from evener.model.source import open_model
from evener.verify import Reference, verify

LOPSIDED = """
name: lopsided
replicas:
  - stages:
      - layers: [0, 11]
        shards:
          - {device: "cpu:0", heads: [0, 7], ffn: [0, 384], embed_rows: [0, 49152]}
          - {device: "cpu:1", heads: [7, 9], ffn: [384, 1536], embed_rows: [49152, 49152]}
      - layers: [11, 30]
        shards:
          - {device: "cpu:0#1", heads: [0, 0], ffn: [0, 1024], head_rows: [0, 10000]}
          - {device: "cpu:1#1", heads: [0, 9], ffn: [1024, 1536], head_rows: [10000, 49152]}
"""
CORES = ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1")
PLANS: dict[str, dict[str, Any]] = {
    "one device": {"devices": CORES[:1]},
    "tp2": {"tensor_parallel_size": 2},
    "tp3": {"tensor_parallel_size": 3},
    "tp4": {"tensor_parallel_size": 4},
    "pp2": {"pipeline_parallel_size": 2},
    "pp3": {"pipeline_parallel_size": 3},
    "dp2": {"data_parallel_size": 2},
    "tp2 x pp2": {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
    "dp2 x tp2": {"data_parallel_size": 2, "tensor_parallel_size": 2},
    "lopsided": {},
}
COLUMNS = (
    "passed", "max_rel_err", "beyond", "kl", "kl_bound", "greedy_equal", "diverged_at_ties", "diverged_wrongly",
    "sequences", "positions", "chunked_prompts", "mixed_batches", "prefix_hit_tokens", "preemptions", "seconds",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names of plans")
    parser.add_argument("--dtypes", default="fp32,bf16,int8", help="of weights and KV cache")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    args = parser.parse_args()
    names = [n.strip() for n in args.only.split(",")] if args.only else list(PLANS)
    reference = Reference(open_model(None))
    verdicts = {}
    with tempfile.TemporaryDirectory() as tmp:
        lopsided = Path(tmp) / "lopsided.yaml"
        lopsided.write_text(LOPSIDED)
        for dtype, name in product((d.strip() for d in args.dtypes.split(",")), names):
            options = {"devices": CORES, **PLANS[name]} if name != "lopsided" else {"plan": str(lopsided)}
            options["dtype"] = dtype
            verdict = verify(options, requests=args.requests, tokens=args.tokens, reference=reference)
            verdicts[name, dtype] = verdict
            print(name, dtype, verdict, flush=True)
    rows = [[name, dtype, *(getattr(v, c) for c in COLUMNS)] for (name, dtype), v in verdicts.items()]
    print(markdown(["plan", "dtype", *COLUMNS], rows))
    save("verify_plans", {"verdicts": {f"{n} {d}": msgspec.to_builtins(v) for (n, d), v in verdicts.items()}})
    failed = [f"{n} {d}" for (n, d), v in verdicts.items() if not v.passed]
    if failed:
        raise SystemExit(f"not equal to the reference: {', '.join(failed)}")


if __name__ == "__main__":
    main()
