"""Finds plans: every plan of a few devices, good ones of many, each scored by the cost model of the whole plan."""

import itertools
from collections.abc import Sequence

from msgspec import Struct

from evener.cost.rates import crowding, hardware
from evener.errors import InvalidPlan
from evener.plan.capacity import Load, plan_load, plan_times, replica_capacity
from evener.plan.few import MOST_DEVICES, plans_of_few
from evener.plan.many import plans_of_many
from evener.plan.pipeline import Candidate, refine
from evener.plan.problem import Problem
from evener.plan.shortage import shortage
from evener.plan.stages import Split, Stages
from evener.spec.cluster import Device
from evener.spec.memory import block_bytes, kv_blocks, kv_limit, shares_memory, weight_bytes, workspace_bytes
from evener.spec.plan import Plan, Replica, validate
from evener.units import human_bytes

SHORTLIST = 24
"""Plans scored exactly, for each of two orders of merit."""
REFINED = 6
"""Plans whose splits are refined: those that serve the most."""
MOST_WORKER_SETS = 8


class Scored(Struct, frozen=True):
    """A plan and what the cost model predicts for it."""

    plan: Plan
    load: Load


def score(problem: Problem, plan: Plan) -> Scored:
    """Predict a whole plan from its own cost model. Raises InvalidPlan when it cannot work or hold the traffic."""
    validate(plan, problem.model, problem.cluster)
    costs = problem.costs(plan)
    capacities = []
    for r, replica in enumerate(plan.replicas):
        times, delay = plan_times(costs, r, len(replica.stages))
        capacities.append(replica_capacity(problem, times, plan_blocks(problem, replica), delay))
    if (over := host_excess(problem, plan.replicas)) > 0:
        raise InvalidPlan(
            f"the workers of this host need {over} bytes more for weights and activations than the "
            f"{human_bytes(problem.host_bytes or 0)} that are free; use fewer replicas, or a smaller dtype"
        )
    return Scored(plan, plan_load(capacities, problem.demand.rate, problem.demand.output_tokens))


def plan_blocks(problem: Problem, replica: Replica) -> int:
    """KV blocks of a replica, no more than its sequences can use. Raises InvalidPlan with the shortage in bytes."""
    blocks = kv_blocks(replica, problem.model, problem.cluster, problem.memory, problem.kv_bytes)
    need = problem.least_blocks()
    if blocks < need:
        tokens = problem.demand.longest
        raise InvalidPlan(
            f"a replica holds {blocks} KV blocks, the longest request ({tokens} tokens) needs {need}: "
            f"{_kv_shortage(problem, replica, need)} bytes short; give more memory, more stages or shards, or "
            "shorter requests"
        )
    return min(blocks, problem.max_num_seqs * need)


def _kv_shortage(problem: Problem, replica: Replica, need: int) -> int:
    short = 0
    for stage in replica.stages:
        for shard in stage.shards:
            per_block = block_bytes(shard, stage, problem.model, problem.memory)
            device = problem.cluster.device(shard.device)
            room: int | None = kv_limit(device, problem.kv_bytes)
            if device.memory is not None:
                held = weight_bytes(shard, stage, problem.model, problem.memory.dtype)
                room = device.memory - held - workspace_bytes(shard, problem.model, problem.memory)
            short += max(0, need * per_block - (room or 0))
    return short


def host_excess(problem: Problem, replicas: Sequence[Replica]) -> int:
    """Bytes that the devices of this host that declare no memory need beyond what the host has; 0 or less: it fits.

    Of KV, one longest request a replica is counted: what is more, they get of what is left.
    """
    if problem.host_bytes is None:
        return 0
    model, memory, need = problem.model, problem.memory, -problem.host_bytes
    for replica in replicas:
        for stage in replica.stages:
            for shard in stage.shards:
                if shares_memory(problem.cluster.device(shard.device)):
                    need += weight_bytes(shard, stage, model, memory.dtype) + workspace_bytes(shard, model, memory)
                    need += problem.least_blocks() * block_bytes(shard, stage, model, memory)
    return need


_Found = dict[tuple[Replica, ...], tuple[Stages, tuple[Candidate, ...]]]


def _served(candidates: Sequence[Candidate]) -> float:
    return sum(c.capacity.requests_s for c in candidates)


def _keep(problem: Problem, found: _Found, stages: Stages, candidates: tuple[Candidate, ...]) -> None:
    """What the host can hold, with the price among the fewest workers that share hardware: that of others is too high
    for these."""
    key = tuple(c.replica for c in candidates)
    if problem.host_bytes is not None and host_excess(problem, key) > 0:
        return
    if key not in found or _served(candidates) > _served(found[key][1]):
        found[key] = (stages, candidates)


def search(problem: Problem) -> list[Scored]:
    """Plans worth a simulation, the one that serves the most first. Raises InvalidPlan when nothing fits."""
    found: _Found = {}
    for among in worker_sets(problem.cluster.devices):
        names = [d.name for d in among]
        few = len(names) <= MOST_DEVICES
        stages = Stages(problem, among, nearly=not few)
        plans = plans_of_few(problem, stages, names) if few else plans_of_many(problem, stages)
        for candidates in plans:
            _keep(problem, found, stages, candidates)
    if not found:
        raise InvalidPlan(shortage(problem))
    rate, tokens = problem.demand.rate, problem.demand.output_tokens
    most = sorted(found.values(), key=lambda f: -_served(f[1]))[:REFINED]
    known: dict[Stages, dict[object, tuple[Split, ...]]] = {}
    for stages, candidates in most:
        splits = known.setdefault(stages, {})
        _keep(problem, found, stages, tuple(refine(problem, stages, c, splits) for c in candidates))
    loads = [(plan_load([c.capacity for c in cs], rate, tokens), cs) for _, cs in found.values()]
    by_rate = sorted(range(len(loads)), key=lambda k: -loads[k][0].requests_s)
    by_time = sorted(range(len(loads)), key=lambda k: loads[k][0].e2e)
    # A lone device works at its own pace, without others on the memory bus: its estimate above is too low.
    lone = [k for k, (_, cs) in enumerate(loads) if sum(len(c.devices) for c in cs) == 1]
    scored = []
    for k in dict.fromkeys([*by_rate[:SHORTLIST], *by_time[:SHORTLIST], *lone]):
        replicas = tuple(c.replica for c in loads[k][1])
        try:
            scored.append(score(problem, Plan(replicas, name=describe_shape(replicas))))
        except InvalidPlan:
            continue  # the estimate of memory and the account of the runtime differ by a block: not a plan
    if not scored:
        raise InvalidPlan(shortage(problem))
    return sorted(scored, key=lambda s: (-s.load.requests_s, s.load.e2e, len(s.plan.devices()), s.plan.devices()))


def worker_sets(devices: Sequence[Device]) -> list[tuple[Device, ...]]:
    """Sets of workers to search, where several share hardware: with one, two, ... of the workers of each.

    Workers that ask for more of one core than there is each get a share of it, so leaving one out makes others faster.
    """
    shared: dict[tuple[str, str], list[Device]] = {}
    for d in devices:
        shared.setdefault((d.host, hardware(d)), []).append(d)
    counts = [range(len(group), 0, -1) if _crowded(group) else (len(group),) for group in shared.values()]
    out = []
    for chosen in itertools.islice(itertools.product(*counts), MOST_WORKER_SETS):
        names = {d.name for n, group in zip(chosen, shared.values(), strict=True) for d in group[:n]}
        out.append(tuple(d for d in devices if d.name in names))
    return out


def _crowded(group: Sequence[Device]) -> bool:
    return any(crowding(d, group) > 1.0 for d in group)


def describe_shape(replicas: Sequence[Replica]) -> str:
    """`dp2-tp2` for like replicas, `tp2 + 2 x pp3` for unlike ones, the device's name where it is a whole replica."""
    shapes = [_shape(replica) for replica in replicas]
    if len(set(shapes)) == 1:
        parts = [f"dp{len(shapes)}"] if len(shapes) > 1 else []
        parts += [shapes[0]] if shapes[0] else []
        return "-".join(parts) or replicas[0].devices()[0]
    counted = {s: shapes.count(s) for s in dict.fromkeys(shapes)}
    names = {s: s or "single" for s in counted}
    return " + ".join(f"{n} x {names[s]}" if n > 1 else names[s] for s, n in counted.items())


def _shape(replica: Replica) -> str:
    sizes = [len(s.shards) for s in replica.stages]
    if len(set(sizes)) > 1:
        return "pp(" + ",".join(f"tp{n}" for n in sizes) + ")"
    parts = [f"tp{sizes[0]}"] if sizes[0] > 1 else []
    parts += [f"pp{len(sizes)}"] if len(sizes) > 1 else []
    return "-".join(parts)
