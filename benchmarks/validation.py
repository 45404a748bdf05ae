"""Hardware that is not at hand: predictions against what others measured, from ../shared/traces/validation.csv.

Every row names a model, GPUs, a tensor-parallel size and a workload. Each is predicted twice, by measured operator
tables (`aiconfigurator-core`) and by published peaks, without any figure of the row itself but its workload:

    static batches (Splitwise)        one prefill of the batch, then the mean decode step
    closed loops (aiconfigurator)     simulated, `concurrency` requests at a time
    a recorded trace (RTX PRO 6000)   simulated, request by request at its recorded arrivals

What is assumed where a row is silent: the engine's limits and shares in `ENGINE`, K and V in the dtype that the engine
takes by default, the cost models' own assumptions (`MissingTerms`, `evener.cost.published`).

    benchmarks/validation.py [--only splitwise] [--host-us 300] [--launch-us 0]
"""

import argparse
import csv
import json
import sys
import time
from collections import defaultdict, deque
from collections.abc import Iterator
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np

from common import SHARED, markdown, save
from evener.brain import Brain, BrainConfig
from evener.cost.base import BatchShape, CostModel
from evener.cost.published import cluster_profile
from evener.cost.roofline import RooflineCostModel
from evener.cost.tables import MissingTerms, TablesCostModel
from evener.engine.request import Request
from evener.errors import InvalidInput
from evener.execute.sim.body import Outcome, SimRequest, Simulator
from evener.plan.default import equal_plan
from evener.profile.aiconfigurator import tables_of
from evener.spec.cluster import Cluster
from evener.spec.cluster_text import cluster_from_mapping
from evener.spec.memory import MemoryConfig, kv_blocks
from evener.spec.model import ModelSpec
from evener.units import NS_PER_S, Bytes, Nanoseconds
from validation_models import model_of

GPUS = {
    "A100-80GB": "a100_sxm_80gb", "H100-80GB": "h100_sxm", "H100-SXM": "h100_sxm", "H200-SXM": "h200_sxm",
    "B200-SXM": "b200_sxm", "RTX PRO 6000": "rtx_pro_6000", "RTX 4090": "rtx_4090",
}  # fmt: skip
PRECISIONS = {"fp16": "fp16", "bf16": "bf16", "fp8": "fp8", "unstated": "bf16"}
"""Unstated: the checkpoint's own."""
KV = {"fp8": "fp8"}
"""InferenceX serves 8-bit checkpoints with 8-bit K and V; otherwise 16 bits."""
ENGINE = {"seqs": 256, "tokens": 8192, "memory": 0.9}
"""vLLM's defaults for the API server on large GPUs, and the share of memory that it takes."""
LOGGED = {"seqs": 128, "tokens": 2048, "memory": 0.9}
"""The two runs with logs: the token budget is in their notes, the cap is the most that their time series shows."""
ROUNDS = 6
"""Requests of a closed loop, in multiples of its concurrency; the first and the last are left out of the means."""


class Prediction(NamedTuple):
    """Seconds and tokens per second."""

    ttft: float
    tpot: float
    rate: float


class Case(NamedTuple):
    """A row of the file, and what is needed to predict it."""

    row: dict[str, str]
    model: ModelSpec
    cluster: Cluster
    dtype: str
    kv_dtype: str


def case_of(row: dict[str, str]) -> Case | str:
    """The case, or why there is none."""
    if row["gpu"] not in GPUS:
        return "clusters of unlike GPUs are in benchmarks/planner_helix.py"
    model = model_of(row["model"])
    if model is None:
        return f"{row['model']}: mixtures of experts have no cost model yet"
    device = {"device": "cuda:0", "profile": GPUS[row["gpu"]], "count": int(row["tp"])}
    cluster = cluster_from_mapping({"hosts": [{"name": "gpu", "devices": [device]}]})
    dtype = PRECISIONS[row["precision"]]
    return Case(row, model, cluster, dtype, KV.get(dtype, dtype))


def costs_of(case: Case, how: str, terms: MissingTerms) -> CostModel:
    """`tables` or `peaks`. Raises InvalidInput where nothing was measured."""
    plan = equal_plan(case.model, list(case.cluster.devices), len(case.cluster.devices), 1, 1)
    if how == "tables":
        engine = "trtllm" if case.row["backend"].startswith("trtllm") else "vllm"
        tables = {d.name: tables_of(d, engine) for d in case.cluster.devices}
        return TablesCostModel(
            case.model, plan, case.cluster, tables, dtype=case.dtype, kv_dtype=case.kv_dtype, terms=terms
        )
    return RooflineCostModel(
        case.model, plan, cluster_profile(case.cluster), dtype=case.dtype, kv_dtype=case.kv_dtype,
        links=case.cluster.links,
    )  # fmt: skip


def static(case: Case, costs: CostModel) -> Prediction:
    """A batch that starts and ends together."""
    batch, prompt, output = (int(case.row[k]) for k in ("concurrency", "isl", "osl"))
    pairs = batch * prompt * (prompt + 1) // 2
    first = costs.stage_ns(0, 0, BatchShape(batch * prompt, pairs, sampled_rows=batch, chunks=batch)) / NS_PER_S
    context = batch * (prompt + output // 2)
    step = BatchShape(decode_rows=batch, decode_context=context, sampled_rows=batch)
    tpot = costs.stage_ns(0, 0, step) / NS_PER_S
    return Prediction(first, tpot, batch / tpot)


class ClosedLoop(Simulator):
    """Sends the next request when one ends."""

    def __init__(self, brain: Brain, costs: CostModel, lengths: Iterator[tuple[int, int]], at_once: int) -> None:
        self.done: list[Outcome] = []
        self._lengths, self._sent, self._due = lengths, 0, deque[SimRequest]()
        for _ in range(at_once):
            self._send(Nanoseconds(0))
        super().__init__(brain, costs, _Queue(self._due), on_end=self._ended)

    def _send(self, now: Nanoseconds) -> None:
        lengths = next(self._lengths, None)
        if lengths is not None:
            self._due.append(sim_request(self._sent, now, *lengths))
            self._sent += 1

    def _ended(self, outcome: Outcome) -> None:
        self.done.append(outcome)
        self._send(self.now)
        if self._next is None:
            self._read()


class _Queue(Iterator[SimRequest]):
    """An iterator that may have more to give after it had none."""

    def __init__(self, due: "deque[SimRequest]") -> None:
        self._due = due

    def __next__(self) -> SimRequest:
        if not self._due:
            raise StopIteration
        return self._due.popleft()


def sim_request(number: int, at: int, prompt: int, output: int) -> SimRequest:
    """One request of exactly these lengths."""
    return SimRequest(Request(f"r{number}", prompt, output), Nanoseconds(at), output)


def brain_of(case: Case, costs: CostModel, limits: dict[str, Any]) -> Brain:
    """First come, first served, as vLLM and TensorRT-LLM do, within the memory that is left for K and V."""
    plan = equal_plan(case.model, list(case.cluster.devices), len(case.cluster.devices), 1, 1)
    usable = tuple(
        type(d)(**{f: getattr(d, f) for f in d.__struct_fields__} | {"memory": Bytes(int(d.memory * limits["memory"]))})
        for d in case.cluster.devices
        if d.memory is not None
    )
    memory = MemoryConfig(dtype=case.dtype, kv_dtype=case.kv_dtype, max_batch_tokens=limits["tokens"])
    blocks = kv_blocks(plan.replicas[0], case.model, Cluster(usable), memory)
    config = BrainConfig(
        policy="fcfs", max_num_seqs=limits["seqs"], max_num_batched_tokens=limits["tokens"], max_queue=1_000_000
    )
    return Brain(plan, [blocks], costs, config)


def closed_loop(case: Case, costs: CostModel) -> Prediction:
    """`concurrency` requests at a time; lengths as the row says."""
    at_once, prompt, output = (int(case.row[k]) for k in ("concurrency", "isl", "osl"))
    rng = np.random.default_rng(0)
    least = 0.8 if case.row["id"].startswith("aic:2026") else 1.0  # InferenceX draws lengths, the others do not
    shares = rng.uniform(least, 1.0, (ROUNDS * at_once, 2))
    lengths = ((max(1, int(prompt * a)), max(1, int(output * b))) for a, b in shares)
    loop = ClosedLoop(brain_of(case, costs, ENGINE), costs, lengths, at_once)
    loop.run()
    middle = sorted(loop.done, key=lambda o: o.arrival)[at_once:-at_once]
    return summary(middle)


def replayed(case: Case, costs: CostModel, log: Path) -> Prediction:
    """The recorded arrivals and lengths of every request."""
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    began = min(e["queued_ts"] for e in entries)
    traffic = sorted(
        (sim_request(k, round((e["queued_ts"] - began) * NS_PER_S), e["input_toks"], e["output_toks"])
         for k, e in enumerate(entries)), key=lambda r: r.arrival,
    )  # fmt: skip
    return summary(Simulator(brain_of(case, costs, LOGGED), costs, traffic).run())


def summary(outcomes: list[Outcome]) -> Prediction:
    """Means over requests; tokens over the time from the first arrival to the last end."""
    lost = [o for o in outcomes if o.finish not in ("stop", "length")]
    if lost:
        raise RuntimeError(f"{len(lost)} simulated requests did not finish: {lost[0]}")
    ttft = mean((o.first_token or 0) - o.arrival for o in outcomes) / NS_PER_S
    tpot = mean(((o.ended or 0) - (o.first_token or 0)) / (o.tokens - 1) for o in outcomes if o.tokens > 1) / NS_PER_S
    span = max(o.ended or 0 for o in outcomes) - min(o.arrival for o in outcomes)
    return Prediction(ttft, tpot, sum(o.tokens for o in outcomes) / span * NS_PER_S)


def predict(case: Case, costs: CostModel) -> Prediction:
    """By the kind of workload."""
    source = case.row["id"].partition(":")[0]
    if source == "splitwise":
        return static(case, costs)
    if source == "llmservingsim":
        name = case.row["id"].partition(":")[2]
        return replayed(case, costs, SHARED / "traces" / f"measured_vllm_{name}_requests.jsonl")
    return closed_loop(case, costs)


MEASURED = {"ttft": "ttft_ms", "tpot": "tpot_ms", "rate": "output_tok_s"}


def measured(row: dict[str, str]) -> Prediction:
    """What the row says."""
    return Prediction(float(row["ttft_ms"]) / 1e3, float(row["tpot_ms"]) / 1e3, float(row["output_tok_s"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="rows whose id contains this")
    parser.add_argument("--host-us", type=float, default=MissingTerms().host_ns / 1e3, help="assumed, per batch")
    parser.add_argument("--launch-us", type=float, default=0.0, help="to start one kernel, without graphs")
    parser.add_argument("--file", type=Path, default=SHARED / "traces" / "validation.csv")
    args = parser.parse_args()
    if not args.file.is_file():
        parser.error(f"{args.file} does not exist; give --file, or EVENER_SHARED")
    terms = MissingTerms(host_ns=round(args.host_us * 1e3), launch_ns=args.launch_us * 1e3)

    shown: list[list[object]] = []
    errors: dict[tuple[str, str, str], list[Prediction]] = defaultdict(list)
    skipped: dict[str, int] = defaultdict(int)
    for row in csv.DictReader(args.file.open(encoding="utf-8")):
        if args.only not in row["id"]:
            continue
        case = case_of(row)
        if isinstance(case, str):
            skipped[case] += 1
            continue
        truth, source = measured(row), row["id"].partition(":")[0]
        for how in ("tables", "peaks"):
            began = time.process_time()
            try:
                got = predict(case, costs_of(case, how, terms))
            except InvalidInput as error:
                skipped[f"{how}: {error.message[:90]}"] += 1
                continue
            off = Prediction(*(p / t - 1 for p, t in zip(got, truth, strict=True)))
            errors[source, row["gpu"], how].append(off)
            work = f"{row['isl']}+{row['osl']} x {row['concurrency'] or 'trace'}"
            figures = [f"{scale * p:.4g} / {scale * t:.4g} ({o:+.0%})"
                       for p, t, o, scale in zip(got, truth, off, (1e3, 1e3, 1), strict=True)]  # fmt: skip
            shown.append([source, row["model"].split("/")[-1], row["gpu"], f"tp{row['tp']} {case.dtype}", work, how,
                          *figures])  # fmt: skip
            print(f"{row['id']} {how}: {time.process_time() - began:.1f} s", file=sys.stderr, flush=True)
    print(markdown(["source", "model", "GPU", "plan", "workload", "by", "TTFT ms", "TPOT ms", "output tok/s"], shown))
    print()
    print(markdown(
        ["source", "GPU", "by", "rows", *(f"{k}: median error (median size)" for k in Prediction._fields)],
        [[*key, len(offs), *(f"{median(o[k] for o in offs):+.0%} ({median(abs(o[k]) for o in offs):.0%})"
                             for k in range(3))] for key, offs in sorted(errors.items())],
    ))  # fmt: skip
    for why, count in skipped.items():
        print(f"left out, {count} rows: {why}")
    save("validation", {"rows": shown, "left_out": dict(skipped), "terms": str(terms)})


if __name__ == "__main__":
    main()
