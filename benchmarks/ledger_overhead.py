"""What recording costs: the same load with the ledger on and off, in alternation, in one run.

Two engines are up at once on the same cores, one with the ledger and one without; while one is loaded the other sleeps.
A round loads each of them once with the same requests, every other round the other one first. Quoted is the median over
the rounds of the ratio of output tokens per second, on over off, and of CPU time of all the worker and control threads
per token: on a busy machine the CPU time is the steadier of the two.

    benchmarks/ledger_overhead.py [--rounds 8] [--layouts tp2,pp2] [--rows 8] [--tokens 40] [--segments]
"""

import argparse
import asyncio
import sys
import time
from contextlib import AsyncExitStack, aclosing
from statistics import median
from typing import Any, cast

import psutil

from common import markdown, save
from evener.api import start_engine
from evener.engine.request import Request, SamplingParams
from evener.execute.live.engine import LiveEngine

TWO = ("cpu:0", "cpu:1")
LAYOUTS: dict[str, dict[str, Any]] = {
    "tp2": {"devices": TWO, "tensor_parallel_size": 2},
    "pp2": {"devices": TWO, "pipeline_parallel_size": 2},
    "dp2": {"devices": TWO, "data_parallel_size": 2},
}


async def one_round(engine: LiveEngine, rows: int, tokens: int) -> tuple[float, float]:
    """Output tokens per second, and CPU milliseconds per token of workers and of this process."""
    processes = [psutil.Process(), *(psutil.Process(r.pid) for r in engine.ready.values())]

    async def one(k: int) -> int:
        prompt = [100 + 7 * k + j for j in range(32)]
        request = Request(f"r{k}", len(prompt), tokens, prompt, sampling=SamplingParams(temperature=0.0))
        got = 0
        async with aclosing(cast(Any, engine.submit(request))) as answers:
            async for answer in answers:
                got += answer.count
        return got

    cpu = sum(sum(p.cpu_times()[:2]) for p in processes)
    began = time.perf_counter()
    made = sum(await asyncio.gather(*(one(k) for k in range(rows))))
    took = time.perf_counter() - began
    cpu = sum(sum(p.cpu_times()[:2]) for p in processes) - cpu
    return made / took, 1000 * cpu / made


async def compare(
    options: dict[str, Any], rounds: int, rows: int, tokens: int, segments: bool
) -> dict[str, list[tuple[float, float]]]:
    """(tokens per second, CPU ms per token) of every round, with the ledger on and off."""
    async with AsyncExitStack() as stack:
        engines = {}
        for name, more in (("off", {"ledger": False}), ("on", {"trace_segments": segments})):
            engines[name] = await start_engine(kv_cache_memory="256MiB", **options, **more)
            stack.push_async_callback(engines[name].close)
        for engine in engines.values():
            await one_round(engine, rows, 4)
        results: dict[str, list[tuple[float, float]]] = {name: [] for name in engines}
        for k in range(rounds):
            for name in sorted(engines, reverse=bool(k % 2)):
                results[name].append(await one_round(engines[name], rows, tokens))
    return results


def main() -> None:
    """Run the layouts and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--layouts", default="tp2,pp2")
    parser.add_argument("--rows", type=int, default=8, help="Requests at once.")
    parser.add_argument("--tokens", type=int, default=40, help="Output tokens of each.")
    parser.add_argument("--segments", action="store_true", help="Keep every stretch too.")
    args = parser.parse_args()
    rows, kept = [], {}
    for name in args.layouts.split(","):
        print(f"{name}: {args.rounds} rounds", file=sys.stderr, flush=True)
        found = asyncio.run(compare(LAYOUTS[name], args.rounds, args.rows, args.tokens, args.segments))
        kept[name] = found
        pairs = list(zip(found["on"], found["off"], strict=True))
        speed = median(on[0] / off[0] for on, off in pairs)
        cpu = median(on[1] / off[1] for on, off in pairs)
        middle = [median(x[i] for x in found[how]) for i in (0, 1) for how in ("on", "off")]
        rows.append([name, *(f"{x:.1f}" for x in middle), f"{100 * (speed - 1):+.2f}%", f"{100 * (cpu - 1):+.2f}%"])
    head = ["layout", "tok/s on", "tok/s off", "CPU ms/token on", "CPU ms/token off", "throughput", "CPU"]
    print(markdown(head, rows))
    save("ledger_overhead", {"rounds": args.rounds, "rows": args.rows, "tokens": args.tokens, "results": kept})


if __name__ == "__main__":
    main()
