"""How close to the hardware: prefill, decode and one stream, as shares of the rates that `evener devices` measured.

    benchmarks/floor.py [--dtype int8] [--layouts 'one core,one process,tp2,dp2'] [--rounds 3]

Prefill: prompts of 512 tokens, one answer token; operations of the matrices over the measured GEMM rate at 256 rows.
Decode: 64 rows for 192 steps at contexts of 128 to 320 tokens; operations over the GEMM rate at 64 rows. One stream: a
step reads all weights once; its bytes over the measured read bandwidth. Attention and all else count as loss: the last
column says where the devices' time went. Rates are those of one device, times the devices that work.
"""

import argparse
from statistics import median
from typing import NamedTuple

from common import markdown, save
from evener.api import Prepared
from evener.ledger.causes import Cause
from evener.spec.memory import weight_bytes
from evener.workload.rehearse import Rehearsal
from evener.workload.requests import TimedRequest
from steady import engine, equal, losses, rates, run, share_of, weights

PREFILL, ROWS, STEPS = 512, 64, 192


class Case(NamedTuple):
    """One load, and what it is measured against."""

    name: str
    requests: list[TimedRequest]
    peak: float
    unit: str


def cases(prepared: Prepared, dtype: str) -> list[Case]:
    """Fresh requests, and the peak of the devices that work on them."""
    measured, devices, replicas = rates(prepared), len(prepared.plan.devices()), len(prepared.plan.replicas)

    def gemm(rows: int) -> float:
        return devices * 2 * rows / float(measured.gemm_ns(dtype, rows))

    return [
        Case("prefill", equal(48, PREFILL, 1), gemm(256), "GFLOP/s"),
        Case("decode, 64 rows", equal(ROWS, 128, STEPS), gemm(ROWS // replicas), "GFLOP/s"),
        Case("one stream", equal(1, 128, 256), measured.read_bandwidth * devices / replicas / 1e9, "GB/s"),
    ]


def achieved(case: Case, done: Rehearsal, prepared: Prepared, dtype: str) -> tuple[float, float]:
    """Tokens per second, and what was achieved in the unit of the peak."""
    layers, head = weights(prepared)
    step_s = (done.report.tpot_ms.p50 or 0.0) / 1e3
    if case.name == "prefill":
        tokens = done.report.input_tokens
        flop = 2 * (tokens * layers + len(case.requests) * head)
        return tokens / done.report.duration_s, flop / done.report.duration_s / 1e9
    if case.name == "one stream":
        stages = prepared.plan.replicas[0].stages  # the embedding is tied, and so counted once, as the head
        read = sum(weight_bytes(shard, stage, prepared.model, dtype) for stage in stages for shard in stage.shards)
        return 1 / step_s, read / step_s / 1e9
    return ROWS / step_s, 2 * ROWS * (layers + head) / step_s / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="int8")
    parser.add_argument("--layouts", default="one core,one process,tp2,dp2")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    rows = []
    for layout in (x.strip() for x in args.layouts.split(",")):
        prepared = engine(layout, args.dtype)
        found: dict[str, list[tuple[float, float]]] = {}
        for _ in range(args.rounds):
            for case in cases(prepared, args.dtype):
                done = run(prepared, case.requests)
                found.setdefault(case.name, []).append(achieved(case, done, prepared, args.dtype))
                if len(found[case.name]) == args.rounds:
                    tokens, rate = (median(x) for x in zip(*found[case.name], strict=True))
                    share = f"{100 * rate / case.peak:.0f}%"
                    host = f"{100 * share_of(done, Cause.HOST):.2f}%"
                    rows.append([layout, case.name, tokens, rate, case.peak, case.unit, share, host, losses(done)])
                    print(rows[-1], flush=True)
    table = ["layout", "case", "tok/s", "achieved", "measured peak", "unit", "share", "host", "where the time went"]
    print(markdown(table, rows))
    save("floor", {"dtype": args.dtype, "rows": rows})


if __name__ == "__main__":
    main()
