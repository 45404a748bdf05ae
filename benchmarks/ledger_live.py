"""Law 2 on real workers: every device-second has a cause, and compute is what the thread's CPU clock says.

Several layouts on two cores, one after the other, each under load for `--seconds`: closed loop (a fixed number of
requests outstanding), or bursts with idle time between them. For every device:

- `closes`: its causes sum to its wall time, to the nanosecond, and its wall time is the time that passed;
- `unattributed`: the share of its wall time that nothing explains;
- `compute`: what the ledger calls compute (prefill, decode, what was thrown away), without declared sleep;
- `thread`: CPU time of the worker's thread, read from outside (/proc/<pid>/task/<tid>/schedstat), less what the worker
  spent inside operations (spinning, copying) and between batches;
- `apart`: compute over thread, less one. Within 2% is the aim.

    benchmarks/ledger_live.py [--seconds 60] [--only tp2,pp2]
"""

import argparse
import asyncio
import os
import random
import sys
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from common import markdown, save
from evener.api import start_engine
from evener.engine.request import Request, SamplingParams
from evener.execute.live.engine import LiveEngine
from evener.ledger.account import Account
from evener.spec.cluster import parse_device

TWO = ("cpu:0", "cpu:1")
FOUR = ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1")


@dataclass(frozen=True)
class Case:
    """A layout and how it is loaded."""

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    bursty: bool = False


CASES = (
    Case("tp2", {"devices": TWO, "tensor_parallel_size": 2}),
    Case("pp2", {"devices": TWO, "pipeline_parallel_size": 2}),
    Case("dp2", {"devices": TWO, "data_parallel_size": 2}),
    Case("tp2 x pp2", {"devices": FOUR, "tensor_parallel_size": 2, "pipeline_parallel_size": 2}),
    Case("tp2 slowdown 2", {"devices": ("cpu:0", "cpu:1,slowdown=2"), "tensor_parallel_size": 2}),
    Case("pp2 slowdown 2", {"devices": ("cpu:0", "cpu:1,slowdown=2"), "pipeline_parallel_size": 2}),
    Case("tp2 bursts", {"devices": TWO, "tensor_parallel_size": 2}, bursty=True),
    Case("dp2 bursts", {"devices": TWO, "data_parallel_size": 2}, bursty=True),
)


async def one_request(engine: LiveEngine, name: str, rng: random.Random) -> None:
    """A prompt of 8 to 400 tokens, an answer of 4 to 120, most of them short."""
    prompt = [rng.randrange(100, 32_000) for _ in range(min(400, int(rng.lognormvariate(4, 0.9)) + 8))]
    cap = min(120, int(rng.lognormvariate(3, 0.8)) + 4)
    request = Request(name, len(prompt), cap, prompt, sampling=SamplingParams(temperature=0.8, seed=len(prompt)))
    async with aclosing(cast(Any, engine.submit(request))) as answers:
        async for _ in answers:
            pass


async def load(engine: LiveEngine, seconds: float, bursty: bool, outstanding: int = 6) -> int:
    """Load the engine for so long, and let what was begun finish. Returns how many requests there were."""
    rng = random.Random(1)
    end = time.monotonic() + seconds
    sent = 0

    async def client() -> None:
        nonlocal sent
        while time.monotonic() < end:
            sent += 1
            await one_request(engine, f"r{sent}", rng)

    if not bursty:
        await asyncio.gather(*(client() for _ in range(outstanding)))
        return sent
    tasks = []
    while time.monotonic() < end:
        for _ in range(rng.randrange(1, 9)):
            sent += 1
            tasks.append(asyncio.create_task(one_request(engine, f"r{sent}", rng)))
        await asyncio.sleep(rng.expovariate(1 / 3))
    await asyncio.gather(*tasks)
    return sent


def thread_cpu_s(pid: int) -> float:
    """CPU seconds of a process's main thread: the one that runs the batches. Exact while it sleeps."""
    return int(Path(f"/proc/{pid}/task/{pid}/schedstat").read_text().split()[0]) / 1e9


@dataclass
class Reading:
    """Everything at one instant at which all workers are idle."""

    at: float
    account: Account
    thread_s: dict[str, float]
    """Device -> CPU seconds of its thread in batches, operations left out."""


async def read(engine: LiveEngine) -> Reading:
    """Wait until every worker has reported, and read both sides."""
    await asyncio.sleep(0.5)
    ledger = engine.ledger()
    reported = engine.chronicle.reported
    thread = {}
    for name, ready in engine.ready.items():
        beside = (reported[name].wait_cpu + reported[name].idle_cpu) / 1e9 if name in reported else 0.0
        thread[name] = thread_cpu_s(ready.pid) - beside
    return Reading(ledger.now / 1e9, ledger.account(), thread)


@asynccontextmanager
async def running(case: Case) -> AsyncIterator[LiveEngine]:
    engine = await start_engine(kv_cache_memory="256MiB", **case.options)
    try:
        yield engine
    finally:
        await engine.close()


async def measure(case: Case, seconds: float) -> list[dict[str, Any]]:
    """Figures of every device of a case."""
    slow = {(d := parse_device(text)).name: d.slowdown for text in case.options["devices"]}
    async with running(case) as engine:
        await load(engine, 1.0, False, 2)
        before = await read(engine)
        requests = await load(engine, seconds, case.bursty)
        after = await read(engine)
    rows = []
    for name, now in after.account.devices.items():
        then = before.account.devices[name]
        causes = {c: now.causes[c] - then.causes[c] for c in now.causes}
        wall = now.wall_s - then.wall_s
        compute = (now.compute_s - then.compute_s) / slow[name]
        thread = after.thread_s[name] - before.thread_s[name]
        passed = after.at - before.at
        rows.append(
            {
                "case": case.name,
                "device": name,
                "requests": requests,
                "wall_s": wall,
                "closes": now.wall_ns == sum(now.causes_ns) and abs(wall - passed) < 1e-6,
                "unattributed": causes["unattributed"] / wall,
                "compute_s": compute,
                "thread_s": thread,
                "apart": compute / thread - 1,
                "causes": causes,
            }
        )
    return rows


def main() -> None:
    """Run the cases and print what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--only", help="Names of cases, separated by commas.")
    args = parser.parse_args()
    cases = [c for c in CASES if not args.only or c.name in args.only.split(",")]
    if len(os.sched_getaffinity(0)) < 2:
        raise SystemExit("this needs two cores")
    results = []
    for case in cases:
        print(f"{case.name}: {args.seconds:g} s", file=sys.stderr, flush=True)
        found = asyncio.run(measure(case, args.seconds))
        results += found
        for r in found:
            text = f"  {r['device']}: {100 * r['unattributed']:.2f}% unattributed, {100 * r['apart']:+.2f}% apart"
            print(text, file=sys.stderr, flush=True)
    lost = ("contended", "straggler", "transfer", "bubble", "host", "no_demand")
    rows = [
        [
            r["case"], r["device"], f"{r['wall_s']:.1f}", "yes" if r["closes"] else "NO",
            f"{100 * r['unattributed']:.2f}%", f"{r['compute_s']:.2f}", f"{r['thread_s']:.2f}",
            f"{100 * r['apart']:+.2f}%", *(f"{100 * r['causes'][c] / r['wall_s']:.1f}%" for c in lost),
        ]
        for r in results
    ]  # fmt: skip
    head = ["layout", "device", "wall s", "closes", "unattributed", "compute s", "thread s", "apart", *lost]
    print(markdown(head, rows))
    worst = max(r["unattributed"] for r in results)
    apart = max(abs(r["apart"]) for r in results)
    print(f"\nworst: {100 * worst:.2f}% unattributed, compute {100 * apart:.2f}% apart from the thread's clock")
    save("ledger_live", {"seconds": args.seconds, "devices": results})


if __name__ == "__main__":
    main()
