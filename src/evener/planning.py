"""From what a user says to a planning problem: model, devices, traffic, objective. Loads no weights."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil
from msgspec import Struct, structs

from evener.cost.rates import Profile
from evener.errors import InvalidDevice, InvalidInput
from evener.model.shapes import model_shape
from evener.model.source import open_model
from evener.plan.planner import Choice, choose_plan
from evener.plan.problem import Bounds, CostFactory, Item, Problem, demand_of
from evener.plan.trial import Progress
from evener.profile import load_cluster, local_devices, profile_of
from evener.profile.costs import costs_of
from evener.profile.hardware import free_memory
from evener.spec.cluster import Cluster, Device, parse_device, parse_size
from evener.spec.memory import MemoryConfig
from evener.spec.model import DTYPE_BYTES, ModelSpec, quant_group
from evener.units import Bytes, Seconds
from evener.workload.slo import parse_slo
from evener.workload.spec import Arrivals, parse_traffic
from evener.workload.traffic import DEFAULT_INPUT, DEFAULT_OUTPUT

DEFAULT_TRAFFIC = f"in={DEFAULT_INPUT},out={DEFAULT_OUTPUT}"


class PlanOptions(Struct, frozen=True, kw_only=True):
    """What `evener plan` is told. Names are those of the options."""

    model: str | None = None
    """Directory, .gguf file, hub id, or a config.json alone; None: the default model."""
    cluster: str | None = None
    """YAML file; excludes `devices`."""
    devices: tuple[str, ...] = ()
    """None: all of this host."""
    traffic: str = DEFAULT_TRAFFIC
    """See `evener.workload.spec`."""
    slo: str | None = None
    dtype: str | None = None
    """None: fp32 for CPUs, else bf16, or fp16 where a device lacks it."""
    kv_dtype: str | None = None
    """None: as `dtype`."""
    kv_cache_memory: str | None = None
    """Per device that declares no memory."""
    max_num_seqs: int | None = None
    """None: 64 on CPUs, 256 on GPUs."""
    policy: str = "equal-time"
    costs: str = "rates"
    """`rates`: measured here, published or assumed; `tables`: measured operators of GPUs (the extra `tables`)."""


def make_plan(
    *, requests: int = 400, progress: Progress = lambda what, done, steps: None, **options: Any
) -> tuple[Problem, Choice]:
    """Plan with the fields of `PlanOptions`. Raises InvalidInput (what was said) or InvalidPlan (what does not fit)."""
    known = PlanOptions.__struct_fields__
    for name in options:
        if name not in known:
            raise InvalidInput(f"option {name!r} is unknown; options are {', '.join(known)}")
    problem = check_objective(make_problem(PlanOptions(**options)))
    return problem, choose_plan(problem, requests=requests, progress=progress)


def check_objective(problem: Problem) -> Problem:
    """Refuse (InvalidInput) what no plan can be chosen by: times of requests that all come at once."""
    if problem.demand.rate is None and (problem.bounds.ttft is not None or problem.bounds.e2e is not None):
        raise InvalidInput(
            "--slo bounds ttft or e2e, and the traffic has no rate: all requests come at once, and how long they wait "
            "says only how many there are; give rate= (or a trace with arrivals), or bound tpot alone"
        )
    return problem


def make_problem(options: PlanOptions) -> Problem:
    """Check what was said and put the problem together."""
    if options.cluster is not None and options.devices:
        raise InvalidInput("--cluster names the devices itself; leave out --devices")
    cluster = _cluster(options)
    profile = profile_of(cluster)
    model = _model(options.model)
    arrivals = parse_traffic(options.traffic)
    items, rate = _items(arrivals), arrivals.rate
    longest = max(items, key=lambda i: i.input_tokens + i.output_tokens)
    if longest.input_tokens + longest.output_tokens > model.max_position:
        raise InvalidInput(
            f"the traffic has a request of {longest.input_tokens} + {longest.output_tokens} tokens, the model's "
            f"context is {model.max_position}; shorten the lengths, or scale a trace with context={model.max_position}"
        )
    gpus = any(d.kind == "cuda" for d in cluster.devices)
    rows = options.max_num_seqs or (256 if gpus else 64)
    dtype = options.dtype or _dtype(cluster, profile)
    kv_dtype = options.kv_dtype or dtype
    for what, value in (("--dtype", dtype), ("--kv-dtype", kv_dtype)):
        if value not in DTYPE_BYTES:
            raise InvalidInput(f"{what} {value!r} is not one of {', '.join(DTYPE_BYTES)}")
    return Problem(
        model=structs.replace(model, quant_group=quant_group(dtype)),  # or serve refuses the cuts
        cluster=cluster,
        profile=profile,
        demand=demand_of(items, rate),
        items=items,
        memory=_memory(model, cluster, dtype, kv_dtype, rows),
        kv_bytes=_kv_bytes(options, cluster),
        host_bytes=free_memory(cluster),
        max_num_seqs=rows,
        bounds=parse_bounds(options.slo),
        policy=options.policy,
        factory=_factory(options.costs, dtype, kv_dtype),
    )


def parse_bounds(text: str | None) -> Bounds:
    """`ttft=2s,tpot=100ms` -> Bounds, by the rules of `evener bench --slo`."""
    if text is None:
        return Bounds()
    slo = parse_slo(text)
    given = (slo.ttft_ms, slo.tpot_ms, slo.e2e_ms)
    return Bounds(*(None if v is None else Seconds(v / 1e3) for v in given))


def _factory(how: str, dtype: str, kv_dtype: str) -> CostFactory | None:
    """What makes cost models of plans; None: the rates of the profile."""
    if how == "rates":
        return None
    if how != "tables":
        raise InvalidInput(f"--costs {how!r} is not one of rates, tables")
    return lambda model, plan, cluster: costs_of(model, plan, cluster, "tables", dtype=dtype, kv_dtype=kv_dtype)


def _model(name: str | None) -> ModelSpec:
    if name is not None and Path(name).suffix == ".json":
        return model_shape(name)
    return open_model(name).spec


def _cluster(options: PlanOptions) -> Cluster:
    if options.cluster is not None:
        return load_cluster(options.cluster)
    devices: Sequence[Device] = [parse_device(text) for text in options.devices] or local_devices()
    names = [d.name for d in devices]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InvalidDevice(f"device {twice} is named twice; name a second worker on it {twice}#1")
    return Cluster(tuple(devices))


def _items(arrivals: Arrivals) -> tuple[Item, ...]:
    return tuple(Item(Seconds(r.arrival_s), r.input_tokens, r.output_tokens) for r in arrivals.trace.rows)


def _dtype(cluster: Cluster, profile: Profile) -> str:
    """What every device has a rate for: 16 bits on GPUs, fp32 on CPUs."""
    if all(d.kind == "cpu" for d in cluster.devices):
        return "fp32"
    have = [{g.dtype for g in d.together.gemm} for d in profile.devices]
    return next((t for t in ("bf16", "fp16") if all(t in h for h in have)), "fp32")


def _memory(model: ModelSpec, cluster: Cluster, dtype: str, kv_dtype: str, rows: int) -> MemoryConfig:
    """Workspace for batches of 2048 prompt tokens; less where that would take a tenth of the smallest memory."""
    declared = [d.memory for d in cluster.devices if d.memory is not None]
    tokens = 2048
    row = 4 * (4 * model.hidden + 2 * model.head_dim * (model.heads + model.kv_heads) + 3 * model.ffn)
    while declared and tokens > 256 and (tokens + rows) * row > min(declared) / 10:
        tokens //= 2
    return MemoryConfig(dtype=dtype, kv_dtype=kv_dtype, max_batch_tokens=tokens + rows)


def _kv_bytes(options: PlanOptions, cluster: Cluster) -> Bytes | None:
    if options.kv_cache_memory is not None:
        return parse_size(options.kv_cache_memory, "kv_cache_memory")
    local = [d for d in cluster.devices if d.host == "localhost"]
    if all(d.memory is not None for d in local):
        return None
    # As `evener serve` does: a third of what is free now, shared by the workers of this host.
    return Bytes(psutil.virtual_memory().available // 3 // len(local))
