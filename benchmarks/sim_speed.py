"""How fast the simulator is: the Azure conversation trace on 1 to 64 replicas, a million requests on 1,000 devices.

Llama-2-70B in fp16, two A100 80GB per replica (published peaks), 128 sequences, 512 tokens per batch, `fcfs`; lengths
scaled to a context of 4,096. Seconds are processor time of one process on one core, set-up of the plan and the cost
tables included, and every device-second accounted for. Vidur stands beside it, on the same requests in the same rounds,
without metrics and with its tables filled beforehand (see beside/vidur_on_trace.py): only its run counts.

    python benchmarks/sim_speed.py [--only NAME ...] [--rounds 3] [--vidur FOLDER]
"""

import argparse
import gc
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from common import RESULTS, SHARED, BenchmarkFailed, markdown, save
from evener.brain import Brain, BrainConfig
from evener.cost.published import cluster_profile
from evener.cost.rates import bind
from evener.cost.roofline import RooflineCostModel
from evener.engine.request import Request
from evener.execute.sim.body import Simulator
from evener.execute.sim.figures import Figures
from evener.execute.sim.traffic import SimRequest
from evener.ledger.causes import Cause
from evener.ledger.ledger import Ledger
from evener.plan.default import equal_plan
from evener.spec.cluster import Cluster, Device
from evener.spec.memory import MemoryConfig, kv_blocks
from evener.spec.model import ModelSpec
from evener.spec.peaks import published
from evener.units import Nanoseconds, ns
from evener.workload.trace import Trace, read_trace

TRACE = SHARED / "traces" / "azure2023_conv.csv"
LLAMA_2_70B = ModelSpec(
    "llama", vocab=32_000, hidden=8192, layers=80, heads=64, kv_heads=8, head_dim=128, ffn=28_672, max_position=4096
)
TP, SEQUENCES, BUDGET = 2, 128, 512


class Case(NamedTuple):
    """One simulation."""

    replicas: int
    requests: int
    router: str = "least-work"
    speed: float = 1.0
    """The trace, so many times as fast."""
    ledger: bool = True
    fast: bool = True
    beside: bool = False
    """Simulated by Vidur too."""


CASES = {
    "10,000 on 1": Case(1, 10_000, beside=True),
    "10,000 on 8": Case(8, 10_000, beside=True),
    "10,000 on 8, least requests": Case(8, 10_000, "least-requests", beside=True),
    "10,000 on 8, round robin": Case(8, 10_000, "round-robin", beside=True),
    "10,000 on 8, no ledger": Case(8, 10_000, ledger=False, beside=True),
    "10,000 on 8, no fast-forward": Case(8, 10_000, fast=False, beside=True),
    "whole trace on 1": Case(1, 19_366),
    "whole trace on 8": Case(8, 19_366),
    "whole trace on 64": Case(64, 19_366),
    "whole trace, 50 times as fast, on 64": Case(64, 19_366, speed=50),
    "100,000 on 1,000 devices": Case(500, 100_000, speed=400),
    "1,000,000 on 1,000 devices": Case(500, 1_000_000, speed=400),
}


def traffic(trace: Trace, case: Case) -> Iterator[SimRequest]:
    """The trace, as often as need be, one after the other; made as it is asked for."""
    rows, start, k = trace.rows, 0.0, 0
    while True:
        for row in rows:
            if k == case.requests:
                return
            asked = Request(f"q{k}", row.input_tokens, row.output_tokens)
            yield SimRequest(asked, ns((start + row.arrival_s) / case.speed), row.output_tokens)
            k += 1
        start += rows[-1].arrival_s


def run(case: Case) -> dict[str, Any]:
    """Simulate one case in this process."""
    trace = read_trace(TRACE).within(LLAMA_2_70B.max_position)
    sheet = published("a100_sxm_80gb")
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing here makes cycles in numbers; what is live is bounded
    began = time.process_time()
    devices = tuple(
        Device(f"cuda:{k}", "cuda", index=k % 8, host=f"host{k // 8}", peaks=sheet, memory=sheet.memory)
        for k in range(case.replicas * TP)
    )
    cluster = Cluster(devices)
    plan = equal_plan(LLAMA_2_70B, devices, TP, 1, case.replicas)
    profile = bind(cluster_profile(cluster), devices)
    costs = RooflineCostModel(LLAMA_2_70B, plan, profile, dtype="fp16", kv_dtype="fp16")
    memory = MemoryConfig("fp16", "fp16", BUDGET + SEQUENCES)
    blocks = kv_blocks(plan.replicas[0], LLAMA_2_70B, cluster, memory)
    ledger = Ledger(plan, costs, start=Nanoseconds(0), resolution=None, follow_requests=0) if case.ledger else None
    config = BrainConfig(
        policy="fcfs", router=case.router, max_num_seqs=SEQUENCES, max_num_batched_tokens=BUDGET, max_queue=1 << 40
    )
    brain = Brain(plan, [blocks] * case.replicas, costs, config, journal=ledger)
    figures = Figures()
    simulator = Simulator(brain, costs, traffic(trace, case), ledger=ledger, on_end=figures, fast=case.fast)
    simulator.run()
    seconds = time.process_time() - began
    report = figures.report()
    if report.completed != case.requests:
        raise BenchmarkFailed(f"{report.completed} of {case.requests} requests completed: {report.failures}")
    batches = sum(r.batches_issued for r in brain.replicas)
    out = {
        "seconds": seconds,
        "batches": batches,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "virtual_s": report.duration_s,
        "output_tok_s": report.output_tok_s,
        "p90_ttft_ms": report.ttft_ms.p90,
    }
    if ledger is not None:
        account = ledger.account()
        walls = {use.wall_ns for use in account.devices.values()}
        out["closes"] = walls == {simulator.now} and account.total.causes["unattributed"] == 0
        out["useful"] = account.total.share(Cause.PREFILL, Cause.DECODE)
    return out


def child(name: str) -> dict[str, Any]:
    """A case in a process of its own, so that its memory is its own."""
    command = [sys.executable, __file__, "--case", name]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parent)
    if done.returncode:
        raise BenchmarkFailed(f"{name}: {done.stderr}")
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def vidur(folder: Path, requests: int, replicas: int) -> dict[str, Any]:
    """The same requests through Vidur: its seconds and batches."""
    with tempfile.NamedTemporaryFile("w", suffix=".csv") as file:
        file.write("arrived_at,num_prefill_tokens,num_decode_tokens\n")
        for row in read_trace(TRACE).within(LLAMA_2_70B.max_position).rows[:requests]:
            file.write(f"{row.arrival_s},{row.input_tokens},{row.output_tokens}\n")
        file.flush()
        script = Path(__file__).parent / "beside" / "vidur_on_trace.py"
        command = [folder / ".venv/bin/python", script, file.name, "--replicas", str(replicas), "--folder", folder]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        with suppress(json.JSONDecodeError):
            result: dict[str, Any] = json.loads(line)
            return result
    raise BenchmarkFailed(f"Vidur: {done.stdout}{done.stderr}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vidur", type=Path, metavar="FOLDER", help="checkout of Vidur, to measure beside")
    parser.add_argument("--only", nargs="+", choices=CASES, help="default: all; the others stay as measured before")
    parser.add_argument("--rounds", type=int, default=3, help="of cases below 100,000 requests; medians are shown")
    parser.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not TRACE.exists():
        print(f"there is no trace at {TRACE}; set EVENER_SHARED", file=sys.stderr)
        return 2
    if args.case:
        print(json.dumps(run(CASES[args.case])))
        return 0
    found = RESULTS / "sim_speed.json"
    earlier: dict[str, Any] = json.loads(found.read_text()) if args.only and found.exists() else {}
    before = earlier.get("rounds", {})
    rounds: dict[str, list[dict[str, Any]]] = {name: [] for name in args.only or CASES}
    compared = sorted({(CASES[n].requests, CASES[n].replicas) for n in rounds if CASES[n].beside and args.vidur})
    peer: dict[tuple[int, int], list[dict[str, Any]]] = {(n, r): v for n, r, v in earlier.get("vidur", [])}
    peer |= {size: [] for size in compared}
    again = set(rounds)
    for k in range(args.rounds):
        for size in compared:
            theirs = peer[size]
            print(f"round {k + 1} of {args.rounds}: Vidur, {size[0]:,} on {size[1]}", file=sys.stderr, flush=True)
            theirs.append(vidur(args.vidur, *size))
        for name, results in rounds.items():
            if k == 0 or CASES[name].requests < 100_000:
                print(f"round {k + 1} of {args.rounds}: {name}", file=sys.stderr, flush=True)
                results.append(child(name))
    rounds = {name: rounds.get(name) or before[name] for name in CASES if name in rounds or name in before}
    rows = []
    for name, results in rounds.items():
        took = statistics.median(r["seconds"] for r in results)
        case, last = CASES[name], results[-1]
        size = case.requests, case.replicas
        # Side by side are only those of one run.
        theirs = peer.get(size, []) if case.beside and (name in again) == (size in compared) else []
        ratios = [v["seconds"] / r["seconds"] for v, r in zip(theirs, results, strict=bool(theirs))]
        rows.append(
            (
                name, took, last["batches"], last["batches"] / took, 1e6 * took / case.requests,
                statistics.median(ratios) if ratios else None, round(last["peak_mib"]),
                "yes" if last.get("closes") else "off" if "closes" not in last else "NO", round(last["virtual_s"]),
            )
        )  # fmt: skip
    for (requests, replicas), theirs in peer.items():
        took, made = statistics.median(v["seconds"] for v in theirs), theirs[-1]["batches"]
        rows.append(
            (
                f"Vidur: {requests:,} on {replicas}", took, made, made / took, 1e6 * took / requests, 1.0, None, "none",
                round(theirs[-1]["virtual_s"]),
            )
        )  # fmt: skip
    headers = ("requests, replicas", "CPU s", "batches", "batches/s", "us/request", "times Vidur", "peak MiB",
               "ledger closes", "virtual s")  # fmt: skip
    print(markdown(headers, rows))
    save("sim_speed", {"rounds": rounds, "vidur": [[*size, theirs] for size, theirs in peer.items()]})
    return 0


if __name__ == "__main__":
    sys.exit(main())
