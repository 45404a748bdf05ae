"""Helix's cluster of 24 unlike GPUs (4 A100 40 GB, 8 L4, 12 T4, one per host): three measured placements of LLaMA-30B.

Measured: the rows of validation.csv (Helix, ASPLOS 2025, artifact evaluation, single cluster, offline), and from the
same source the throughput of each of its three pipelines. The placements: *Helix* and *separate pipelines* put the same
layers on the same GPUs (A100: 4 x 15 layers; L4: 4 x 7 and 4 x 8; T4: 12 x 5) and differ in how requests are scheduled;
*Swarm* has ten stages of six layers, each held by one to four GPUs between which every request chooses anew.

Profiles of the GPUs come from published peaks (`evener.spec.peaks`, the shares in `evener.cost.published`). Requests in
flight are set to what was measured (throughput x time per token, Little's law), because the prototype's own limit is
not published. `host` is what the prototype adds per stage and batch on top of the GPU's work (Python, copies through
the CPU, ZeroMQ): it is read off the A100 pipeline alone and used for all others.
"""

import argparse
import csv
import tempfile
import time

from msgspec import structs

from common import SHARED, markdown, save
from evener.cost.base import BatchShape
from evener.errors import InvalidPlan
from evener.plan.problem import Item, Problem, demand_of
from evener.plan.search import score, search
from evener.plan.trial import plan_chunk, sample, try_plan
from evener.profile import load_cluster, profile_of
from evener.spec.memory import MemoryConfig
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import NS_PER_S, Seconds

LLAMA_30B = ModelSpec("llama", vocab=32000, hidden=6656, layers=60, heads=52, kv_heads=52, head_dim=128, ffn=17920,
                      max_position=2048)  # fmt: skip
"""huggyllama/llama-30b, config.json."""
PIPELINES = {
    "A100": ("a", [15] * 4, 198.9, 187.3, 0.169),
    "L4": ("l", [7] * 4 + [8] * 4, 64.8, 58.6, 0.533),
    "T4": ("t", [5] * 12, 57.5, 49.2, 0.697),
}
"""Hosts, layers by stage, tokens/s of Helix's scheduling and of separate pipelines, seconds per token of the former."""
SWARM = [["a"], ["a"], ["a"], ["a"], ["l", "t", "l"], ["l", "t", "l"], ["t", "t", "l", "t"], ["t", "t", "l", "t"],
         ["l", "t", "t"], ["l", "t", "t"]]  # fmt: skip
"""Kinds of the GPUs that hold each of Swarm's ten stages of six layers."""
CLUSTER = """
hosts:
  - {{name: a, count: {a}, devices: [{{device: "cuda:0", profile: a100_sxm_40gb}}]}}
  - {{name: l, count: {l}, devices: [{{device: "cuda:0", profile: l4}}]}}
  - {{name: t, count: {t}, devices: [{{device: "cuda:0", profile: t4}}]}}
links:
  - {{between: ["*", "*"], bandwidth: 10Gbit/s, latency: 1ms}}
"""


def make(items: tuple[Item, ...], rows: int, host_ns: int, a100: int = 4, l4: int = 8, t4: int = 12) -> Problem:
    """The cluster with so many of each kind."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as file:
        file.write(CLUSTER.format(a=a100, l=l4, t=t4))
        file.flush()
        cluster = load_cluster(file.name)
    profile = structs.replace(profile_of(cluster), host_ns=host_ns)
    return Problem(
        model=LLAMA_30B, cluster=cluster, profile=profile, demand=demand_of(items), items=items,
        memory=MemoryConfig("fp16", "fp16", 2048 + rows), max_num_seqs=rows,
    )  # fmt: skip


def pipeline(kind: str, layers: list[int]) -> Replica:
    """One GPU per stage."""
    stages, at, last = [], 0, len(layers) - 1
    for k, n in enumerate(layers):
        vocab = (0, LLAMA_30B.vocab)
        shard = Shard(f"{kind}-{k}/cuda:0", (0, 52), (0, 17920), vocab if k == 0 else (0, 0),
                      vocab if k == last else (0, 0))  # fmt: skip
        stages.append(Stage((at, at + n), (shard,)))
        at += n
    return Replica(tuple(stages))


def swarm_tokens_s(problem: Problem, rows: int) -> float:
    """Ten stages that every micro-batch passes: a stage of k GPUs takes k micro-batches at once."""
    kinds = {kind: k for k, kind in enumerate("alt")}
    stages = []
    for s in range(len(SWARM)):
        replicas = []
        for kind in kinds:
            shard = Shard(f"{kind}-0/cuda:0", (0, 52), (0, 17920), (0, 32000) if s == 0 else (0, 0),
                          (0, 32000) if s == 9 else (0, 0))  # fmt: skip
            other = structs.replace(shard, device=f"{kind}-1/cuda:0", embed_rows=(0, 0), head_rows=(0, 32000))
            before = () if s == 0 else (Stage((0, 6), (structs.replace(other, head_rows=(0, 0)),)),)
            after = () if s == 9 else (Stage((54, 60), (other,)),)
            replicas.append(Replica((*before, Stage((6 * s, 6 * s + 6), (shard,)), *after)))
        stages.append((problem.costs(Plan(tuple(replicas)), problem.cluster.devices), 0 if s == 0 else 1))

    def pace(shape: BatchShape) -> tuple[float, float]:
        beats, trip = [], 0.0
        for (costs, at), members in zip(stages, SWARM, strict=True):
            times = [costs.stage_ns(kinds[m], at, shape) for m in members]
            beats.append(1 / sum(1 / x for x in times))
            trip += sum(times) / len(times) + 1e6  # the link's latency
        return max(beats), trip

    best = 0.0
    for groups in range(1, rows + 1):
        beat, trip = pace(problem.demand.settled(rows / groups))
        best = max(best, rows / max(groups * beat, trip) * NS_PER_S)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--no-search", action="store_true", help="only the measured placements")
    args = parser.parse_args()
    items = azure_items(args.requests)
    measured = helix_rows()
    in_flight = {name: round(p[2] * p[4]) for name, p in PIPELINES.items()}
    plans = {name: Plan((pipeline(p[0], p[1]),), name=name) for name, p in PIPELINES.items()}
    host_ns = calibrate(items, plans["A100"], in_flight["A100"], PIPELINES["A100"][2])
    table, figures = [], {}
    sums = {"peaks": 0.0, "host": 0.0, "simulated": 0.0}
    for name, (_, _, helix, separate, _) in PIPELINES.items():
        row = {}
        for what, host in (("peaks", 0), ("host", host_ns)):
            problem = make(items, in_flight[name], host)
            scored = score(problem, plans[name])
            row[what] = scored.load.tokens_s
            if what == "host":
                tried = try_plan(problem, scored, sample(problem, in_flight[name], args.requests))
                row["simulated"] = tried.full_tokens_s
        for what, value in row.items():
            sums[what] += value
        table.append(
            [f"{name} pipeline", helix, separate, row["peaks"], row["host"], row["simulated"], row["host"] / helix - 1]
        )
        figures[name] = {"helix": helix, "separate": separate, **row}
    table.append(["all three: Helix", measured["Helix"], measured["separate_pipelines"], sums["peaks"], sums["host"],
                  sums["simulated"], sums["host"] / measured["Helix"] - 1])  # fmt: skip
    rows = round(measured["Swarm"] * 0.39)  # its average seconds per token, offline
    swarm = {what: swarm_tokens_s(make(items, rows, host), rows) for what, host in (("peaks", 0), ("host", host_ns))}
    table.append(
        ["Swarm", measured["Swarm"], None, swarm["peaks"], swarm["host"], None, swarm["host"] / measured["Swarm"] - 1]
    )
    headers = ["placement", "measured, Helix", "measured, separate", "peaks alone", "with host", "simulated",
               "error with host"]  # fmt: skip
    print(f"host per stage and batch, from the A100 pipeline: {host_ns / 1e6:.1f} ms")
    print(markdown(headers, table))
    figures |= {"all": sums, "swarm": swarm, "measured": measured, "host_ms": host_ns / 1e6}
    if not args.no_search:
        figures["search"] = searches(items, host_ns, args.requests)
    save("planner_helix", figures)


def calibrate(items: tuple[Item, ...], plan: Plan, rows: int, measured: float) -> int:
    """The host time per stage and batch at which the pipeline is as fast as measured, by halving."""
    low, high = 0, 200_000_000
    while high - low > 10_000:
        middle = (low + high) // 2
        faster = score(make(items, rows, middle), plan).load.tokens_s > measured
        low, high = (middle, high) if faster else (low, middle)
    return high


def searches(items: tuple[Item, ...], host_ns: int, requests: int) -> list[dict[str, object]]:
    """Our plan for the cluster and for one of 64, and what it is predicted to reach; without a limit on requests."""
    out: list[dict[str, object]] = []
    table = []
    for counts in ((4, 8, 12), (11, 21, 32)):
        for host in (0, host_ns):
            problem = make(items, 256, host, *counts)
            began = time.process_time()
            try:
                found = search(problem)
            except InvalidPlan as error:
                raise SystemExit(error.message) from error
            seconds = time.process_time() - began
            best = found[0]
            separate: float | None = None
            if counts == (4, 8, 12):
                own = Plan(tuple(pipeline(p[0], p[1]) for p in PIPELINES.values()))
                separate = score(problem, own).load.tokens_s
                tried = try_plan(problem, best, sample(problem, sum(c.rows for c in best.load.replicas), requests))
                simulated: float | None = tried.full_tokens_s
                chunk = plan_chunk(problem, best.plan)
            else:
                simulated, chunk = None, plan_chunk(problem, best.plan)
            table.append([sum(counts), host / 1e6, best.plan.name, best.load.tokens_s, simulated, separate, seconds])
            out.append({"devices": sum(counts), "host_ms": host / 1e6, "plan": best.plan.name, "chunk": chunk,
                        "tokens_s": best.load.tokens_s, "simulated": simulated, "separate": separate,
                        "cpu_s": seconds})  # fmt: skip
    headers = [
        "GPUs",
        "host ms",
        "our plan",
        "at most tok/s",
        "simulated tok/s",
        "Helix's placement, at most",
        "search CPU s",
    ]
    print(markdown(headers, table))
    return out


def azure_items(count: int) -> tuple[Item, ...]:
    """Lengths of the Azure conversation trace up to 2,048 and 1,024 tokens, as Helix takes them, without arrivals."""
    path = SHARED / "traces" / "azure2023_conv.csv"
    if not path.exists():
        raise SystemExit(f"{path} is not here; set EVENER_SHARED to the folder that holds traces/")
    items = []
    with path.open() as file:
        for row in csv.DictReader(file):
            n, m = int(row["input_tokens"]), int(row["output_tokens"])
            if n <= 2048 and m <= 1024:
                items.append(Item(Seconds(0.0), n, m))
    step = max(1, len(items) // count)
    return tuple(items[::step][:count])


def helix_rows() -> dict[str, float]:
    """Measured tokens/s of the three placements."""
    with (SHARED / "traces" / "validation.csv").open() as file:
        rows = {
            r["id"]: float(r["output_tok_s"])
            for r in csv.DictReader(file)
            if r["id"].startswith("helix:LLaMA-30B:offline")
        }
    return {key.rsplit(":", 1)[1]: value for key, value in rows.items()}


if __name__ == "__main__":
    main()
