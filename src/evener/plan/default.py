"""Default plans: every split follows measured time, for a stated traffic mix.

Heads, FFN columns and vocabulary rows are split over the devices of a stage each by itself, because each lies between
two collectives and the slowest device rules each: a device fast at attention may be slow at GEMMs. Layers are split
over the stages so that the slowest stage is as fast as can be. `equal_plan` is the habit from pre-training.
"""

import heapq
import math
from collections.abc import Sequence

import numpy as np
from msgspec import structs

from evener.cost.base import BatchShape
from evener.cost.device import DeviceCosts
from evener.cost.rates import Profile, bind
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidPlan
from evener.spec.cluster import Cluster, Device, Link
from evener.spec.memory import MemoryConfig, block_bytes, weight_bytes, workspace_bytes
from evener.spec.model import ModelSpec
from evener.spec.plan import Interval, Plan, Replica, Shard, Stage, head_unit, intervals, split_even, validate
from evener.spec.traffic import TrafficMix
from evener.units import human_bytes

NOISE = 0.10
"""Devices whose measured times differ by less count as equal: no split should follow from noise alone."""
FFN_UNIT = 16
"""FFN columns and vocabulary rows are cut on multiples of this: whole vectors, whole cache lines."""


def mix_shape(mix: TrafficMix) -> BatchShape:
    """The batch that the mix settles into: `decode_rows` decodes, and the prefill that replaces what they finish.

    With R rows decoding and n output tokens each, R / n requests end per batch, so R / n prompts must enter.
    """
    entering = mix.decode_rows / mix.output_tokens
    computed = mix.input_tokens**2 * (1.0 - mix.cached**2) / 2
    return BatchShape(
        prefill_tokens=round(mix.decode_rows * mix.prefill_tokens_per_output),
        prefill_pairs=round(entering * computed),
        decode_rows=mix.decode_rows,
        decode_context=round(mix.decode_rows * mix.mean_context),
        sampled_rows=round(mix.decode_rows + entering),
        chunks=math.ceil(entering),
    )


def split_by_time(total: int, unit_ns: Sequence[float], multiple: int = 1) -> tuple[Interval, ...]:
    """Split [0, total) so that the slowest part, at `unit_ns` per unit, is as fast as can be.

    Units of `multiple` go one by one to the part that then ends first (optimal for linear costs); on a tie to the
    faster one, then to the earlier. A slower device never gets more units than a faster one; it may get none.
    """
    got = [0] * len(unit_ns)
    heap = [(cost, cost, k) for k, cost in enumerate(unit_ns)]
    heapq.heapify(heap)
    for _ in range(-(-total // multiple)):
        _, cost, k = heap[0]
        got[k] += 1
        heapq.heapreplace(heap, ((got[k] + 1) * cost, cost, k))
    return intervals(got, total, multiple)


def default_plan(
    model: ModelSpec, devices: Sequence[Device], tp: int, pp: int, dp: int, profile: Profile, traffic: TrafficMix,
    *, memory: MemoryConfig | None = None, links: Sequence[Link] = (), dtype: str = "fp32",
) -> Plan:  # fmt: skip
    """A plan of `dp` replicas x `pp` stages x `tp` shards over the first devices, in order, split by measured time.

    `memory` makes stages respect what their devices declare. Raises InvalidPlan with the remedy (too few devices,
    more stages than layers, too little memory), InvalidDevice when the profile lacks a device.
    """
    used = _take(model, devices, tp, pp, dp)
    bound = bind(profile, used)
    shape = mix_shape(traffic)
    replicas = []
    for r in range(dp):
        own = used[r * tp * pp : (r + 1) * tp * pp]
        groups = []
        for s in range(pp):
            names = [d.name for d in own[s * tp : (s + 1) * tp]]
            costs = [DeviceCosts(bound.device(n), model, alone=len(used) == 1, dtype=dtype) for n in names]
            groups.append(split_stage(model, names, costs, shape, first=s == 0, last=s == pp - 1))
        if pp == 1:
            layers: tuple[Interval, ...] = ((0, model.layers),)
        else:
            first_ns, layer_ns = _stage_times(model, groups, bound, shape, links, dtype)
            layers = _split_layers(model.layers, first_ns, layer_ns, _most_layers(model, groups, own, memory))
        replicas.append(Replica(tuple(Stage(x, g) for x, g in zip(layers, groups, strict=True))))
    plan = Plan(tuple(replicas), name=f"default-tp{tp}-pp{pp}-dp{dp}")
    validate(plan, model, Cluster(tuple(used)))
    return plan


def equal_plan(model: ModelSpec, devices: Sequence[Device], tp: int, pp: int, dp: int) -> Plan:
    """The baseline from pre-training: equal layers, equal heads as near as whole heads allow, whatever the devices.

    Raises InvalidPlan as `default_plan` does.
    """
    used = _take(model, devices, tp, pp, dp)
    layers = split_even(model.layers, pp)
    heads, ffn = split_even(model.heads, tp, head_unit(model)), split_even(model.ffn, tp, model.ffn_unit)
    vocab, none = split_even(model.vocab, tp), ((0, 0),) * tp
    names = iter(d.name for d in used)
    replicas = []
    for _ in range(dp):
        stages = []
        for s in range(pp):
            rows = zip(heads, ffn, vocab if s == 0 else none, vocab if s == pp - 1 else none, strict=True)
            stages.append(Stage(layers[s], tuple(Shard(next(names), *parts) for parts in rows)))
        replicas.append(Replica(tuple(stages)))
    plan = Plan(tuple(replicas), name=f"equal-tp{tp}-pp{pp}-dp{dp}")
    validate(plan, model, Cluster(tuple(used)))
    return plan


def _take(model: ModelSpec, devices: Sequence[Device], tp: int, pp: int, dp: int) -> list[Device]:
    for flag, value in (("-tp", tp), ("-pp", pp), ("-dp", dp)):
        if value < 1:
            raise InvalidPlan(f"{flag} {value} must be at least 1")
    if pp > model.layers:
        raise InvalidPlan(
            f"-pp {pp} needs a layer per stage, the model has {model.layers}; use -pp {model.layers} or less"
        )
    need = tp * pp * dp
    if len(devices) < need:
        have = ", ".join(d.name for d in devices) or "none"
        again = f"{devices[0].name.partition('#')[0]}#1" if devices else "cpu:0#1"
        raise InvalidPlan(
            f"-tp {tp} -pp {pp} -dp {dp} needs {need} devices, {len(devices)} are named ({have}); name more with "
            f"--devices, or a second worker on one of them, like {again}"
        )
    return list(devices[:need])


def _level(times: Sequence[float], costs: Sequence[DeviceCosts], pace: Sequence[float]) -> list[float]:
    """Times with those of nearly equal devices set equal; what is declared, and `pace`, count in full."""
    measured = [t / c.stretch for t, c in zip(times, costs, strict=True)]
    out = list(measured)
    group: list[int] = []
    for k in [*sorted(range(len(measured)), key=lambda k: measured[k]), None]:
        if group and (k is None or measured[k] > (1 + NOISE) * measured[group[0]]):
            mean = sum(measured[g] for g in group) / len(group)
            for g in group:
                out[g] = mean
            group = []
        if k is not None:
            group.append(k)
    return [t * c.stretch * p for t, c, p in zip(out, costs, pace, strict=True)]


def split_stage(
    model: ModelSpec, names: list[str], costs: list[DeviceCosts], shape: BatchShape, *, first: bool, last: bool,
    pace: Sequence[tuple[float, float]] | None = None,
) -> tuple[Shard, ...]:  # fmt: skip
    """Split one stage's heads, columns and vocabulary rows, each by its own time.

    `pace`: factors on the devices' times for (heads, columns and rows); more than 1 gives a device less than its speed
    would.
    """
    tp = len(names)
    paces = pace or ((1.0, 1.0),) * tp
    rows, sampled = np.array([max(1, shape.tokens)]), np.array([max(1, shape.sampled_rows)])
    head_ns = [
        float(c.attention_rows(rows, model.heads, model.kv_heads)[0])
        + shape.prefill_pairs * c.pair_ns(model.heads)
        + shape.decode_context * c.key_ns(model.heads, model.kv_heads)
        for c in costs
    ]
    heads = split_by_time(model.heads, _level(head_ns, costs, [heads for heads, _ in paces]), head_unit(model))
    wide = math.lcm(FFN_UNIT, model.ffn_unit)
    ffn_ns = [float(c.ffn_rows(rows, model.ffn)[0]) for c in costs]
    ffn = split_by_time(
        model.ffn,
        _level(ffn_ns, costs, [columns for _, columns in paces]),
        wide if model.ffn >= wide * tp else model.ffn_unit,
    )
    # One split of the vocabulary for both ends, so that a tied matrix is held once.
    vocab_ns = [float(c.head_rows(sampled, model.vocab)[0]) for c in costs]
    vocab = split_by_time(
        model.vocab,
        _level(vocab_ns, costs, [columns for _, columns in paces]),
        FFN_UNIT if model.vocab >= FFN_UNIT * tp else 1,
    )
    none: Interval = (0, 0)
    return tuple(
        Shard(names[k], heads[k], ffn[k], vocab[k] if first else none, vocab[k] if last else none) for k in range(tp)
    )


def _stage_times(
    model: ModelSpec, groups: list[tuple[Shard, ...]], profile: Profile, shape: BatchShape, links: Sequence[Link],
    dtype: str,
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Per stage: nanoseconds with one layer, and per further layer, from the cost model itself."""
    trial = Plan(tuple(Replica(tuple(Stage((0, n), g) for g in groups)) for n in (1, 2)))
    costs = RooflineCostModel(model, trial, profile, dtype=dtype, links=links)
    one = [costs.stage_ns(0, s, shape) for s in range(len(groups))]
    two = [costs.stage_ns(1, s, shape) for s in range(len(groups))]
    return [int(t) for t in one], [t2 - t1 for t1, t2 in zip(one, two, strict=True)]


def _split_layers(total: int, first_ns: list[int], layer_ns: list[int], most: list[int]) -> tuple[Interval, ...]:
    """Layers one by one to the stage that then takes least, at least one and at most `most` each."""
    if sum(most) < total:
        raise InvalidPlan(
            f"the memory that the devices declare holds {sum(most)} of {total} layers (by stage: "
            f"{', '.join(map(str, most))}); declare more memory, or use more stages or shards"
        )
    got = [1] * len(first_ns)
    for _ in range(total - len(got)):
        k = min((k for k in range(len(got)) if got[k] < most[k]), key=lambda k: (first_ns[k] + got[k] * layer_ns[k], k))
        got[k] += 1
    return intervals(got, total)


def _most_layers(
    model: ModelSpec, groups: list[tuple[Shard, ...]], devices: Sequence[Device], memory: MemoryConfig | None
) -> list[int]:
    """Layers that fit each stage's declared memory, with workspace and one KV block; all where none is declared."""
    declared = {d.name: d.memory for d in devices}
    most = []
    for s, shards in enumerate(groups):
        fits = model.layers
        for shard in shards:
            limit = declared[shard.device]
            if memory is None or limit is None:
                continue
            need = [
                weight_bytes(shard, stage, model, memory.dtype)
                + workspace_bytes(shard, model, memory)
                + block_bytes(shard, stage, model, memory)
                for stage in (structs.replace(Stage((0, 0), shards), layers=(0, n)) for n in range(1, model.layers + 1))
            ]
            room = sum(n <= limit for n in need)
            if room < 1:
                raise InvalidPlan(
                    f"device {shard.device} (stage {s}) declares {human_bytes(limit)} but one layer needs "
                    f"{human_bytes(need[0])} there; declare more memory or use a larger -tp"
                )
            fits = min(fits, room)
        most.append(fits)
    return most
