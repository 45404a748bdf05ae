"""Why no plan fits, with the shortage in bytes."""

from dataclasses import replace

from msgspec import structs

from evener.plan.default import equal_plan
from evener.plan.pipeline import build_replica
from evener.plan.problem import Problem
from evener.plan.stages import Group, Stages
from evener.spec.cluster import Cluster
from evener.spec.memory import block_bytes, kv_limit, shares_memory, weight_bytes, workspace_bytes
from evener.units import Bytes, human_bytes

STEPS = 16
"""Halvings of the interval in which the shortage lies."""


def shortage(problem: Problem) -> str:
    """What one replica needs at least, what the devices have, the difference in bytes, and the remedy."""
    model, memory = problem.model, problem.memory
    (stage,) = equal_plan(model, problem.cluster.devices[:1], 1, 1, 1).replicas[0].stages
    (shard,) = stage.shards
    weights = weight_bytes(shard, stage, model, memory.dtype)
    kv = block_bytes(shard, stage, model, memory) * problem.least_blocks()
    devices = problem.cluster.devices
    declared = [d.memory for d in devices if d.memory is not None]
    limits = [kv_limit(d, problem.kv_bytes) for d in devices]
    if problem.kv_bytes is not None and None not in limits and len(devices) * problem.kv_bytes < kv:
        return (
            f"no plan fits: the KV of the longest request ({problem.demand.longest} tokens) needs {human_bytes(kv)}, "
            f"{len(devices)} devices have {human_bytes(problem.kv_bytes)} each for KV: "
            f"{kv - len(devices) * problem.kv_bytes} bytes short; give more KV memory, or shorten the requests"
        )
    work = workspace_bytes(shard, model, memory)
    what = (
        f"the model does not fit: one replica needs weights {human_bytes(weights)}, KV of the longest request "
        f"({problem.demand.longest} tokens) {human_bytes(kv)} and activations of up to {human_bytes(work)} per device; "
        f"{len(declared)} of {len(devices)} devices declare {human_bytes(sum(declared))} together"
    )
    remedy = "add memory or devices, or use a smaller dtype"
    undeclared = [d for d in devices if shares_memory(d)]
    if problem.host_bytes is not None and undeclared:
        what += f", this host has {human_bytes(problem.host_bytes)} free for the other {len(undeclared)}"
        lack = weights + kv + work - sum(declared) - problem.host_bytes
        return f"{what}: {lack} bytes short; {remedy}" if lack > 0 else f"{what}, and no split fits; {remedy}"
    lack = weights + kv - sum(declared)
    if len(declared) == len(devices) and lack > 0:
        return f"{what}: {lack} bytes short; {remedy}"
    more = _more_on_each(problem, weights + kv + work)
    if more is None:
        return f"{what}, and no split leaves room for its part on every one of them; {remedy}"
    return f"{what}, but no split leaves room for its part on every one of them: {more} bytes short on each; {remedy}"


def _more_on_each(problem: Problem, most: int) -> int | None:
    """About the least that every device would have to declare in addition; None when even `most` is not enough."""
    names = [d.name for d in sorted(problem.cluster.devices, key=lambda d: (d.memory is None, d.memory or 0, d.name))]
    layouts: list[list[Group]] = [[tuple(names)]] if len(names) <= problem.model.heads else []
    layouts += [[(n,) for n in order] for order in (names, names[::-1]) if len(order) <= problem.model.layers]

    def fits(extra: int) -> bool:
        devices = tuple(
            d if d.memory is None else structs.replace(d, memory=Bytes(d.memory + extra))
            for d in problem.cluster.devices
        )
        larger = replace(problem, cluster=Cluster(devices, problem.cluster.links))
        stages = Stages(larger, devices)
        return any(build_replica(larger, stages, groups, targets=[1], polish=False) is not None for groups in layouts)

    low, high = 0, most
    if not fits(high):
        return None
    for _ in range(STEPS):
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
