"""The rows of validation.csv as cases, and how each kind of workload is predicted.

static batches (Splitwise)        one prefill of the batch, then the mean decode step
closed loops (aiconfigurator)     simulated, `concurrency` requests at a time
a recorded trace (LLMServingSim)  simulated, request by request at its recorded arrivals
"""

import json
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

import numpy as np
from msgspec import structs

from common import SHARED
from evener.brain import Brain, BrainConfig
from evener.cost.base import BatchShape, CostModel
from evener.cost.tables import MissingTerms
from evener.engine.request import Request
from evener.execute.sim.body import Outcome, SimRequest, Simulator
from evener.plan.default import equal_plan
from evener.profile.costs import costs_of
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
ROUNDS = 10
"""Requests of a closed loop, in multiples of its concurrency. The first ones come all at once and count, as in the
load generators behind the rows."""


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


def costs_by(case: Case, how: str, terms: MissingTerms | None = None) -> CostModel:
    """`tables` or `peaks`. Raises InvalidInput where nothing was measured."""
    plan = equal_plan(case.model, list(case.cluster.devices), len(case.cluster.devices), 1, 1)
    engine = "trtllm" if case.row["backend"].startswith("trtllm") else "vllm"
    return costs_of(
        case.model, plan, case.cluster, how, dtype=case.dtype, kv_dtype=case.kv_dtype, engine=engine, terms=terms
    )


def prompts(case: Case) -> BatchShape:
    """All prompts at once."""
    batch, prompt = int(case.row["concurrency"]), int(case.row["isl"])
    pairs = batch * prompt * (prompt + 1) // 2
    return BatchShape(batch * prompt, pairs, sampled_rows=batch, chunks=batch)


def static(case: Case, costs: CostModel) -> Prediction:
    """A batch that starts and ends together."""
    batch, prompt, output = (int(case.row[k]) for k in ("concurrency", "isl", "osl"))
    first = costs.stage_ns(0, 0, prompts(case)) / NS_PER_S
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
        structs.replace(d, memory=Bytes(int((d.memory or 0) * limits["memory"]))) for d in case.cluster.devices
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
    got = summary(loop.done)
    # The rows give a rate that follows from their times; the same is done here.
    return got._replace(rate=at_once * output / (got.ttft + (output - 1) * got.tpot))


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
