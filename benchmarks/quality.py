"""What each dtype costs in quality: perplexity, KL divergence and top-1 agreement against fp32, by instruction set.

    benchmarks/quality.py [--isas generic,avx512,...] [--tokens 4096]

Both sides are Evener's own decoder, teacher-forced over the same windows of the docstrings of evener (see `evener
quality`); each instruction set runs in a process of its own. The gate is 1% of fp32's perplexity.
"""

import argparse
import json
import os
import subprocess
from typing import Any

from common import EVENER, BenchmarkFailed, markdown, save
from evener.kernels import _native

COLUMNS = ("dtype", "kv_dtype", "perplexity_ratio", "perplexity", "kl", "top1_agreement", "passed")


def measured(isa: str, tokens: int) -> list[dict[str, Any]]:
    """Rows of `evener quality` with these kernels."""
    command = [str(EVENER), "quality", "--json", "--tokens", str(tokens)]
    done = subprocess.run(
        command, env={**os.environ, "EVENER_ISA": isa}, stdout=subprocess.PIPE, text=True, check=False
    )
    try:
        rows: list[dict[str, Any]] = json.loads(done.stdout)
    except json.JSONDecodeError:
        raise BenchmarkFailed(f"evener quality with EVENER_ISA={isa} ended with {done.returncode}") from None
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isas", default=_native.supported_isas())
    parser.add_argument("--tokens", type=int, default=4096)
    args = parser.parse_args()
    found = {isa: measured(isa, args.tokens) for isa in (x.strip() for x in args.isas.split(","))}
    rows = [
        [isa, *(f"{row[c]:.4f}" if c == "perplexity_ratio" else row[c] for c in COLUMNS)]
        for isa, each in found.items()
        for row in each
    ]
    print(markdown(["kernels", *COLUMNS], rows))
    save("quality", {"text": next(iter(found.values()))[0]["text"], "rows": found})
    failed = [" ".join(map(str, row[:3])) for row in rows if not row[-1]]
    if failed:
        raise SystemExit(f"beyond 1% of perplexity: {', '.join(failed)}")


if __name__ == "__main__":
    main()
