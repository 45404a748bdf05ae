"""A plan: which device holds which part of which replica. Frozen data with an epoch. No torch.

    Plan -> Replica (role) -> Stage (layers [a, b)) -> Shard (device, heads [i, j), ffn [k, l), ...)

Intervals are half open and unequal ones are the normal case. KV heads follow from the query heads and may
be held by two shards; a shard may own no head at all.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
from msgspec import Struct

from evener.errors import InvalidPlan
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec

Interval = tuple[int, int]


def size(interval: Interval) -> int:
    """Number of elements of a half-open interval."""
    return interval[1] - interval[0]


class Shard(Struct, frozen=True, forbid_unknown_fields=True):
    """The part of one stage that one device computes."""

    device: str
    heads: Interval
    """Query heads [i, j)."""
    ffn: Interval
    """Columns [k, l) of the feed-forward network (rows of gate and up, inputs of down)."""
    embed_rows: Interval = (0, 0)
    """Vocabulary rows of the embedding held here (first stage only)."""
    head_rows: Interval = (0, 0)
    """Vocabulary rows of the output head held here (last stage only)."""

    def kv_heads(self, model: ModelSpec) -> Interval:
        """KV heads that the query heads read."""
        i, j = self.heads
        return (i // model.group, -(-j // model.group)) if j > i else (0, 0)


class Stage(Struct, frozen=True, forbid_unknown_fields=True):
    """Consecutive layers, split over the shards of one tensor-parallel group."""

    layers: Interval
    shards: tuple[Shard, ...]


class Replica(Struct, frozen=True, forbid_unknown_fields=True):
    """One whole copy of the model."""

    stages: tuple[Stage, ...]
    role: Literal["both", "prefill", "decode"] = "both"
    """Others than `both` have their place in the form; no scheduler serves them yet."""

    def devices(self) -> tuple[str, ...]:
        """Device names in stage order, then shard order."""
        return tuple(sh.device for st in self.stages for sh in st.shards)


class Plan(Struct, frozen=True, forbid_unknown_fields=True):
    """Replicas, and the epoch that every batch, collective, segment and span names."""

    replicas: tuple[Replica, ...]
    epoch: int = 0
    name: str = "plan"

    def devices(self) -> tuple[str, ...]:
        """All device names."""
        return tuple(d for r in self.replicas for d in r.devices())


def head_unit(model: ModelSpec) -> int:
    """Query heads between legal cuts: whole heads that are whole quantisation groups of the inputs of o_proj."""
    return model.quant_group // math.gcd(model.quant_group, model.head_dim)


def split_even(total: int, parts: int, multiple: int = 1) -> tuple[Interval, ...]:
    """Split [0, total) into `parts` intervals as even as whole multiples allow; the first get the more."""
    return split_by_weight(total, [1.0] * parts, multiple)


def split_by_weight(total: int, weights: Sequence[float], multiple: int = 1) -> tuple[Interval, ...]:
    """Split [0, total) in proportion to `weights`, cutting on multiples of `multiple`.

    Largest-remainder rounding over whole units; the last unit may be short. Weights of zero are legal, as long as
    one is positive. Raises InvalidPlan otherwise.
    """
    whole = math.fsum(weights)
    if not weights or min(weights) < 0 or not 0 < whole < math.inf:
        raise InvalidPlan(f"cannot split {total} by weights {list(weights)}; give weights >= 0, one of them positive")
    units = -(-total // multiple)
    exact = [units * w / whole for w in weights]
    got = [int(x + 1e-9) for x in exact]
    order = sorted(range(len(weights)), key=lambda k: (got[k] - exact[k], k))
    for k in order[: units - sum(got)]:
        got[k] += 1
    return intervals(got, total, multiple)


def intervals(units: Sequence[int], total: int, multiple: int = 1) -> tuple[Interval, ...]:
    """Adjacent intervals of so many units of `multiple`, clipped to [0, total)."""
    out, at = [], 0
    for n in units:
        end = min(total, at + n * multiple)
        out.append((at, end))
        at = end
    return tuple(out)


def _cover(parts: list[Interval], total: int, what: str, where: str) -> None:
    at = 0
    for a, b in parts:
        if b < a:
            raise InvalidPlan(f"{where}: {what} [{a}, {b}) run backwards; write [{b}, {a}]")
        if not 0 <= a <= b <= total:
            raise InvalidPlan(f"{where}: {what} [{a}, {b}) are not inside [0, {total}); the model has {total}")
        if a == b:
            continue
        if a > at:
            raise InvalidPlan(
                f"{where}: {what} [{at}, {a}) belong to nobody here; let the intervals touch, in ascending order"
            )
        if a < at:
            raise InvalidPlan(f"{where}: {what} [{a}, {min(at, b)}) are held twice; let the intervals touch")
        at = b
    if at != total:
        raise InvalidPlan(f"{where}: {what} [{at}, {total}) belong to nobody; extend the last interval")


def _on_group(cut: int, multiple: int, total: int, what: str, where: str) -> None:
    if cut % multiple and cut != total:
        raise InvalidPlan(
            f"{where}: {what} cut {cut} is not a multiple of {multiple} (inputs that share a scale in int8); "
            f"move it to {cut // multiple * multiple}"
        )


def validate(plan: Plan, model: ModelSpec, cluster: Cluster) -> None:
    """Refuse a plan that cannot work, naming the place, the reason and the remedy (InvalidPlan).

    Memory is checked by `evener.spec.memory.kv_blocks`, which needs the dtypes.
    """
    if not plan.replicas:
        raise InvalidPlan("the plan has no replica; give at least one")
    seen: dict[str, str] = {}
    known = {d.name for d in cluster.devices}
    for r, replica in enumerate(plan.replicas):
        if not replica.stages:
            raise InvalidPlan(f"replica {r} has no stage; give at least one")
        if replica.role != "both":
            raise InvalidPlan(
                f"replica {r} has role {replica.role}: KV is not handed from prefill to decode replicas (yet); use both"
            )
        _cover([s.layers for s in replica.stages], model.layers, "layers", f"replica {r}")
        for s, stage in enumerate(replica.stages):
            where = f"replica {r}, stage {s}"
            if not stage.shards:
                raise InvalidPlan(f"{where} has no shard; name at least one device")
            if size(stage.layers) < 1:
                raise InvalidPlan(f"{where} has no layer; drop the stage or give it layers")
            for shard in stage.shards:
                if shard.device not in known:
                    have = ", ".join(sorted(known)) or "none"
                    raise InvalidPlan(f"{where}: device {shard.device!r} is unknown (devices: {have}); "
                                      "add it with --devices")  # fmt: skip
                if shard.device in seen:
                    raise InvalidPlan(f"{where}: device {shard.device} already works in {seen[shard.device]}; "
                                      f"name a second worker on it, like {shard.device}#1")  # fmt: skip
                seen[shard.device] = where
            _cover([sh.heads for sh in stage.shards], model.heads, "query heads", where)
            _cover([sh.ffn for sh in stage.shards], model.ffn, "FFN columns", where)
            for sh in stage.shards:
                for cut in sh.heads:
                    _on_group(cut, head_unit(model), model.heads, "query head", where)
                for cut in sh.ffn:
                    _on_group(cut, model.ffn_unit, model.ffn, "FFN", where)
            first, last = s == 0, s == len(replica.stages) - 1
            for rows, here, what in (
                ([sh.embed_rows for sh in stage.shards], first, "embedding rows"),
                ([sh.head_rows for sh in stage.shards], last, "head rows"),
            ):
                if here:
                    _cover(rows, model.vocab, what, where)
                elif any(size(x) for x in rows):
                    raise InvalidPlan(f"{where}: {what} belong to the {'first' if what[0] == 'e' else 'last'} "
                                      "stage only; remove them here")  # fmt: skip


def from_mapping(raw: Any, model: ModelSpec) -> Plan:
    """Build a plan from parsed YAML, filling in what was left out with even splits (InvalidPlan).

    A shard may leave out `heads`, `ffn`, `embed_rows` and `head_rows` if all shards of its stage do; the
    split is then even. A single stage may leave out `layers`.
    """
    if not isinstance(raw, dict) or not isinstance(raw.get("replicas"), list):
        raise InvalidPlan("a plan is a mapping with a list `replicas`; see docs/plans.md for an example")
    full: dict[str, Any] = {**raw, "replicas": []}
    for r, replica in enumerate(raw["replicas"]):
        if not isinstance(replica, dict) or not isinstance(replica.get("stages"), list):
            raise InvalidPlan(f"replica {r} is a mapping with a list `stages`")
        stages = []
        for s, stage in enumerate(replica["stages"]):
            where = f"replica {r}, stage {s}"
            if not isinstance(stage, dict) or not isinstance(stage.get("shards"), list):
                raise InvalidPlan(f"{where} is a mapping with a list `shards`")
            shards = [{"device": x} if isinstance(x, str) else x for x in stage["shards"]]
            if not all(isinstance(x, dict) for x in shards):
                raise InvalidPlan(f"{where}: a shard is a device name or a mapping with `device`")
            wanted = [("heads", model.heads, head_unit(model)), ("ffn", model.ffn, model.ffn_unit)]
            wanted += [("embed_rows", model.vocab, 1)] if s == 0 else []
            wanted += [("head_rows", model.vocab, 1)] if s == len(replica["stages"]) - 1 else []
            for key, total, multiple in wanted:
                given = sum(key in x for x in shards)
                if given == 0 and shards:
                    parts = split_even(total, len(shards), multiple)
                    shards = [{**x, key: part} for x, part in zip(shards, parts, strict=True)]
                elif given < len(shards):
                    raise InvalidPlan(f"{where}: {key} is given for {given} of {len(shards)} shards; "
                                      "give it for all or for none")  # fmt: skip
            layers = stage.get("layers", (0, model.layers) if len(replica["stages"]) == 1 else None)
            if layers is None:
                raise InvalidPlan(f"{where} does not say its layers; write `layers: [a, b]`")
            stages.append({**stage, "layers": layers, "shards": shards})
        full["replicas"].append({**replica, "stages": stages})
    try:
        return msgspec.convert(full, Plan, strict=True)
    except msgspec.ValidationError as error:
        raise InvalidPlan(f"the plan does not parse: {error}") from error
