"""From options to a running engine: open the model, know the devices, make or read the plan, size the KV, start.

Everything that can be refused is refused here, before any worker starts.
"""

import os
from collections.abc import Callable, Sequence
from typing import Any

import msgspec
import psutil
from msgspec import Struct, structs

from evener.brain import BrainConfig
from evener.cache import weights_limit
from evener.cost.dtype import fastest_dtype
from evener.cost.rates import Profile, bind, default_profile
from evener.cost.roofline import RooflineCostModel
from evener.cost.work import PlanWork
from evener.engine.policy import make_policy
from evener.errors import InvalidDevice, InvalidInput, InvalidPlan
from evener.execute.live.engine import LiveEngine
from evener.execute.live.fleet import LiveConfig
from evener.model.source import ModelSource, open_model
from evener.plan.auto import choose_layout
from evener.plan.capacity import default_chunk
from evener.plan.default import default_plan, equal_plan
from evener.plan.load import AUTO, check_layout, load_plan
from evener.profile.hardware import check_present, free_memory, local_devices
from evener.profile.store import load_profile
from evener.router.choose import make_router
from evener.spec.cluster import Cluster, Device, Link, parse_device, parse_size
from evener.spec.memory import MemoryConfig, block_bytes, kv_blocks
from evener.spec.model import ModelSpec, quant_group
from evener.spec.plan import Plan, validate
from evener.spec.traffic import TrafficMix, parse_traffic_mix
from evener.units import NS_PER_S, Bytes, Seconds, human_bytes

DTYPES = ("fp32", "bf16", "int8")
"""Of weights and of the KV cache."""


class EngineOptions(Struct, frozen=True, kw_only=True):
    """Everything a user may say about an engine. Names follow vLLM's where the meaning is the same."""

    model: str | None = None
    """Directory, .gguf file or hub id; None: the default model."""
    devices: tuple[str, ...] = ()
    """As in `evener.spec.cluster`; none: one worker per core, as many as the plan needs."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    plan: str | None = None
    """YAML file, or `auto` to choose for these devices and `traffic_mix`; excludes the three sizes and a split."""
    split: str = "time"
    """`time`: by measured time for `traffic_mix`; `equal`: the pre-training habit."""
    traffic_mix: str | None = None
    dtype: str = "fp32"
    """Of the weights: fp32, bf16, int8, or auto: what was measured to be fastest on these devices."""
    kv_dtype: str | None = None
    """Of the KV cache: fp32, bf16 or int8; None: as dtype."""
    policy: str = "equal-time"
    router: str = "least-work"
    max_model_len: int | None = None
    """None: what the model and the KV memory allow."""
    max_num_seqs: int = 64
    max_num_batched_tokens: int | None = None
    """None: the largest chunk that is predicted to take half a second."""
    max_queue: int = 1024
    kv_cache_memory: str | None = None
    """Per device, like 1GiB; None: a share of what the host has free."""
    links: tuple[Link, ...] = ()
    static_batch: int = 32
    static_wait_s: float = 0.1
    start_timeout_s: float = 120.0
    worker_timeout_s: float = 60.0
    record: str | None = None
    """File for every event, command and span, for replay."""
    ledger: bool = True
    """Account for every device-second."""
    trace_segments: bool = False
    """Keep every stretch between two operations too, for traces."""


class Prepared(Struct, frozen=True):
    """What `prepare` decided; nothing runs yet."""

    options: EngineOptions
    source: Any
    """The opened `ModelSource`."""
    model: ModelSpec
    cluster: Cluster
    plan: Plan
    profile: Profile
    costs: Any
    """The `CostModel`."""
    kv_blocks: list[int]
    max_model_len: int
    max_num_batched_tokens: int
    why: str = ""
    """Of a plan that was chosen (`auto`): what it is predicted to do, and beside what."""


def prepare(options: EngineOptions, source: ModelSource | None = None) -> Prepared:
    """Check the options against the model and this host. Raises an InvalidInput that names value and remedy."""
    for name, value, known in (("dtype", options.dtype, (*DTYPES, AUTO)), ("kv_dtype", options.kv_dtype, DTYPES)):
        if value is not None and value not in known:
            raise InvalidInput(f"{name} {value!r} is not supported; use one of {', '.join(known)}")
    make_policy(options.policy)
    make_router(options.router)
    weights_limit()  # else a worker would say so, seconds later
    for name in ("max_num_seqs", "static_batch"):
        if getattr(options, name) < 1:
            raise InvalidInput(f"{name}={getattr(options, name)} must be at least 1")
    if options.max_queue < 0:
        raise InvalidInput(f"max_queue={options.max_queue} must not be negative")
    if options.trace_segments and not options.ledger:
        raise InvalidInput("--trace-segments is part of the ledger; leave out --no-ledger")
    for name, least in (("start_timeout_s", 0.1), ("worker_timeout_s", 0.1), ("static_wait_s", 0.0)):
        seconds = getattr(options, name)
        if not least <= seconds <= 86_400.0:
            raise InvalidInput(f"{name}={seconds} must be a number of seconds from {least:g} to 86400")
    source = source or open_model(options.model)
    cluster, profile = _devices(options, source.spec)
    mix = parse_traffic_mix(options.traffic_mix) if options.traffic_mix else TrafficMix()
    dtype = fastest_dtype(profile, DTYPES, mix) if options.dtype == AUTO else options.dtype
    kv_dtype = options.kv_dtype or dtype
    options = structs.replace(options, dtype=dtype, kv_dtype=kv_dtype)
    model = structs.replace(source.spec, quant_group=quant_group(dtype))
    cluster, plan, why = _plan(options, model, cluster, profile, mix)
    costs = RooflineCostModel(
        model, plan, bind(profile, cluster.devices), dtype=dtype, kv_dtype=kv_dtype, links=options.links
    )
    given = options.max_num_batched_tokens
    chunk = (
        given
        if given is not None
        else default_chunk(lambda shape: max(costs.batch_ns(r, shape) for r in range(len(plan.replicas))))
    )
    if chunk < 1:
        raise InvalidInput(f"max_num_batched_tokens={chunk} must be at least 1")
    blocks, longest = _kv(options, model, cluster, plan, chunk)
    return Prepared(
        options=options, source=source, model=model, cluster=cluster, plan=plan, profile=profile, costs=costs,
        kv_blocks=blocks, max_model_len=longest, max_num_batched_tokens=chunk, why=why,
    )  # fmt: skip


async def start_engine(
    model: str | None = None,
    *,
    prepared: Prepared | None = None,
    progress: Callable[[str], None] | None = None,
    **options: Any,
) -> LiveEngine:
    """Start an engine in this event loop. `options` are the fields of EngineOptions.

    Raises InvalidInput before anything starts, StartFailed when a worker does not come up.
    """
    if prepared is None:
        prepared = prepare(make_options(model=model, **options))
    given = prepared.options
    return await LiveEngine.start(
        prepared.model,
        prepared.plan,
        prepared.cluster,
        prepared.kv_blocks,
        prepared.costs,
        brain_config(prepared),
        LiveConfig(
            model_path=str(prepared.source.path),
            dtype=given.dtype,
            kv_dtype=given.kv_dtype or given.dtype,
            max_model_len=prepared.max_model_len,
            start_timeout=Seconds(given.start_timeout_s),
            wait_deadline=Seconds(given.worker_timeout_s),
            record=given.record,
            ledger=given.ledger,
            trace_segments=given.trace_segments,
        ),
        # A share of an assumed peak would be a made-up figure.
        work=plan_work(prepared) if given.ledger and prepared.profile.source != "default" else None,
        costs_made_of=_costs_made_of(prepared),
        progress=progress,
    )


def brain_config(prepared: Prepared) -> BrainConfig:
    """What the brain is told, live or simulated."""
    given = prepared.options
    return BrainConfig(
        policy=given.policy,
        router=given.router,
        max_num_seqs=given.max_num_seqs,
        max_num_batched_tokens=prepared.max_num_batched_tokens,
        max_queue=given.max_queue,
        static_batch=given.static_batch,
        static_wait_ns=round(given.static_wait_s * NS_PER_S),
    )


def plan_work(prepared: Prepared) -> PlanWork:
    """Operations and bytes of batches, for the ledger to set beside the peak."""
    profile = bind(prepared.profile, prepared.cluster.devices)
    given = prepared.options
    return PlanWork(prepared.model, prepared.plan, profile, given.dtype, given.kv_dtype or given.dtype)


def _costs_made_of(prepared: Prepared) -> dict[str, Any]:
    """What a recording says of its cost model: enough to make an equal one."""
    return {
        "kind": "roofline",
        "version": prepared.costs.version,
        "dtype": prepared.options.dtype,
        "kv_dtype": prepared.options.kv_dtype,
        "profile": msgspec.to_builtins(prepared.profile),
    }


def make_options(**options: Any) -> EngineOptions:
    """EngineOptions from keywords. Raises InvalidInput for an unknown one, or a value of another type."""
    known = EngineOptions.__struct_fields__
    for name in options:
        if name not in known:
            raise InvalidInput(f"option {name!r} is unknown; options are {', '.join(known)}")
    for name in ("devices", "links"):
        if name in options:
            value = options[name]
            options[name] = (value,) if isinstance(value, str | Link) else value
    for name in ("model", "plan", "record"):
        if isinstance(options.get(name), os.PathLike):
            options[name] = os.fspath(options[name])
    try:
        return msgspec.convert(options, EngineOptions)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$.")
        raise InvalidInput(f"option {where.rstrip('`') or '?'}: {what.lower()}; see evener.api.EngineOptions") from None


def _devices(options: EngineOptions, model: ModelSpec) -> tuple[Cluster, Profile]:
    """The devices that may be used, and what is known of their speed."""
    tp, pp, dp = options.tensor_parallel_size, options.pipeline_parallel_size, options.data_parallel_size
    for flag, value in (("-tp", tp), ("-pp", pp), ("-dp", dp)):
        if value < 1:
            raise InvalidInput(f"{flag} {value} must be at least 1")
    given = [parse_device(text) for text in options.devices]
    names = [d.name for d in given]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InvalidInput(f"device {twice} is named twice; name a second worker on it {twice}#1")
    if options.plan is not None:
        check_layout(options.plan, options.split, (tp, pp, dp))
    if options.plan == AUTO:
        devices = given or [d for d in local_devices() if d.kind == "cpu"]
    elif options.plan is not None:
        devices = given or [parse_device(name) for name in load_plan(options.plan, model).devices()]
    else:
        devices = given or _own_devices(tp * pp * dp)
    for device in devices:
        if device.kind != "cpu":
            raise InvalidDevice(f"device {device.name}: plans on GPUs are not served yet; name cpu devices")
    cluster = Cluster(tuple(devices), options.links)
    check_present(cluster.devices)
    return cluster, load_profile(cluster) or default_profile(devices)


def _plan(
    options: EngineOptions, model: ModelSpec, cluster: Cluster, profile: Profile, mix: TrafficMix
) -> tuple[Cluster, Plan, str]:
    """The plan, the cluster with the devices that it uses alone, and why (where it was chosen)."""
    layout = options.tensor_parallel_size, options.pipeline_parallel_size, options.data_parallel_size
    memory, why = _memory_config(options, 512), ""
    if options.plan == AUTO:
        room = _kv_room(options, len(cluster.devices))
        plan, why = choose_layout(
            model, cluster, profile, mix, memory, room, options.max_num_seqs, options.policy,
            host_bytes=free_memory(cluster),
        )  # fmt: skip
    elif options.plan is not None:
        plan = load_plan(options.plan, model)
    elif options.split == "equal":
        plan = equal_plan(model, cluster.devices, *layout)
    elif options.split == "time":
        plan = default_plan(
            model, cluster.devices, *layout, profile, mix, memory=memory, links=options.links, dtype=options.dtype
        )
    else:
        raise InvalidInput(f"split {options.split!r} is unknown; use time or equal")
    validate(plan, model, cluster)
    used = set(plan.devices())
    return structs.replace(cluster, devices=tuple(d for d in cluster.devices if d.name in used)), plan, why


def _own_devices(count: int) -> list[Device]:
    """One device per core this process may use."""
    cores = sorted(psutil.Process().cpu_affinity())
    if count == 1 and len(cores) > 1:
        # One worker: all the cores, if they are consecutive.
        first, last = cores[0], cores[-1]
        if cores == list(range(first, last + 1)):
            return [parse_device(f"cpu:{first}-{last}")]
    if count > len(cores):
        raise InvalidPlan(
            f"the plan needs {count} devices, this host has {len(cores)} cores; name the devices, "
            f"and a second worker on a core like cpu:{cores[0]}#1"
        )
    return [parse_device(f"cpu:{core}") for core in cores[:count]]


def _memory_config(options: EngineOptions, chunk: int) -> MemoryConfig:
    return MemoryConfig(
        dtype=options.dtype, kv_dtype=options.kv_dtype or options.dtype, max_batch_tokens=chunk + options.max_num_seqs
    )


def _kv_room(options: EngineOptions, workers: int) -> Bytes:
    """Bytes for KV per device."""
    if options.kv_cache_memory is not None:
        return parse_size(options.kv_cache_memory, "kv_cache_memory")
    # A third of what is free now, shared by all workers of this host; the rest is for weights and activations.
    return Bytes(psutil.virtual_memory().available // 3 // workers)


def _kv(options: EngineOptions, model: ModelSpec, cluster: Cluster, plan: Plan, chunk: int) -> tuple[list[int], int]:
    """KV blocks per replica, and the longest sequence."""
    config = _memory_config(options, chunk)
    size = config.block_tokens
    room = _kv_room(options, len(plan.devices()))
    blocks = []
    for replica in plan.replicas:
        count = kv_blocks(replica, model, cluster, config, room)
        if options.kv_cache_memory is None:
            # No more than all sequences at their longest could use.
            count = min(count, options.max_num_seqs * -(-(options.max_model_len or model.max_position) // size))
        if count < 1:
            stage = replica.stages[0]
            need = max(block_bytes(sh, stage, model, config) for sh in stage.shards)
            raise InvalidInput(
                f"kv_cache_memory={human_bytes(room)} is less than one KV block ({human_bytes(need)}); give more"
            )
        blocks.append(count)
    capacity = min(blocks) * size
    if options.max_model_len is None:
        return blocks, min(model.max_position, capacity)
    if not 2 <= options.max_model_len <= model.max_position:
        raise InvalidInput(
            f"max_model_len={options.max_model_len} is outside 2 to {model.max_position}, what the model was made for"
        )
    if options.max_model_len > capacity:
        raise InvalidInput(
            f"max_model_len={options.max_model_len} does not fit the KV cache of {capacity} tokens; "
            "raise --kv-cache-memory or lower --max-model-len"
        )
    return blocks, options.max_model_len


def describe(plan: Plan) -> Sequence[str]:
    """One line per shard, for people."""
    lines = []
    for r, replica in enumerate(plan.replicas):
        for s, stage in enumerate(replica.stages):
            for shard in stage.shards:
                parts = (("layers", stage.layers), ("heads", shard.heads), ("ffn", shard.ffn))
                held = ", ".join(f"{what} [{a}, {b})" for what, (a, b) in parts)
                lines.append(f"replica {r} stage {s} {shard.device}: {held}")
    return lines
