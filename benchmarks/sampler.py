"""What a step of sampling costs on one core, by kind of request: 64 rows over a vocabulary of 49,152.

Prints a table and writes JSON. Logits follow Zipf's law with exponent 1.2 (flat: 0.8) in random order. Time is the CPU
time of the thread, as other processes may share the core.

    python benchmarks/sampler.py [--rows 64] [--vocab 49152] [--steps 30] [--json results/sampler.json]
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from evener.engine.request import SamplingParams
from evener.execute.live.sampler import Sampler

KINDS: dict[str, list[SamplingParams]] = {
    "greedy": [SamplingParams(temperature=0.0)],
    "temperature": [SamplingParams(temperature=0.8)],
    "greedy and temperature, alternating": [SamplingParams(temperature=0.0), SamplingParams(temperature=0.8)],
    "top_k 50": [SamplingParams(top_k=50)],
    "top_p 0.95": [SamplingParams(top_p=0.95)],
    "top_p 0.95, temperature 0.6": [SamplingParams(top_p=0.95, temperature=0.6)],
    "min_p 0.05": [SamplingParams(min_p=0.05)],
    "repetition 1.1, temperature": [SamplingParams(repetition_penalty=1.1, temperature=0.8)],
    "greedy with 5 logprobs": [SamplingParams(temperature=0.0, logprobs=5)],
}


def zipf(rows: int, vocab: int, exponent: float) -> torch.Tensor:
    """fp32 [rows, vocab]: log-probabilities of ranks, shuffled row by row."""
    law = -exponent * torch.arange(1, vocab + 1).log()
    generator = torch.Generator().manual_seed(1)
    return torch.stack([law[torch.randperm(vocab, generator=generator)] for _ in range(rows)])


def measure(kind: list[SamplingParams], logits_SV: torch.Tensor, steps: int) -> float:
    """Median milliseconds of CPU time of `Sampler.sample` over `steps` positions."""
    rows, vocab = logits_SV.shape
    sampler = Sampler(None, 0, (0, vocab), vocab)
    for s in range(rows):
        sampler.add(s, list(range(s, s + 400)), 300, kind[s % len(kind)])
    slots, took = range(rows), []
    for step in range(steps):
        logits = logits_SV.clone()
        start = time.thread_time()
        sampler.sample(logits, slots, [400 + step] * rows)
        took.append((time.thread_time() - start) * 1e3)
    return statistics.median(took)


def main() -> None:
    """Measure every kind on both laws."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--vocab", type=int, default=49_152)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    laws = {"zipf 1.2": zipf(args.rows, args.vocab, 1.2), "zipf 0.8": zipf(args.rows, args.vocab, 0.8)}
    results = {name: {law: measure(kind, x, args.steps) for law, x in laws.items()} for name, kind in KINDS.items()}
    print(f"{args.rows} rows, vocabulary {args.vocab}, one core, median CPU ms per step")
    print(f"{'':38}" + "".join(f"{law:>10}" for law in laws))
    for name, by_law in results.items():
        print(f"{name:38}" + "".join(f"{by_law[law]:10.2f}" for law in laws))
    if args.json:
        args.json.write_text(json.dumps({"rows": args.rows, "vocab": args.vocab, "cpu_ms": results}, indent=2))


if __name__ == "__main__":
    main()
