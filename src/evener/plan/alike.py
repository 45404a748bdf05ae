"""Which devices are interchangeable: those that declare the same and are, within the noise of measuring, as fast."""

from collections.abc import Sequence

import numpy as np
from msgspec import structs

from evener.cost.device import DeviceCosts
from evener.cost.rates import Profile
from evener.plan.default import NOISE
from evener.plan.problem import Problem
from evener.spec.cluster import Device


def kinds_exactly(profile: Profile, devices: Sequence[Device]) -> dict[str, int]:
    """Device -> number of its kind; the same kind only for the very same figures. `profile` is bound to the devices."""
    kinds: dict[object, int] = {}
    out = {}
    for d in devices:
        rates = structs.replace(profile.device(d.name), name="", hardware="", peers=())
        out[d.name] = kinds.setdefault((rates, d.memory), len(kinds))
    return out


def kinds_nearly(problem: Problem, profile: Profile, devices: Sequence[Device]) -> dict[str, int]:
    """The same for devices whose time for a layer of a usual batch differs by no more than noise: no two cores of a
    host measure the same, and a search that tells all of them apart has no end."""
    sorts: dict[object, list[tuple[float, str]]] = {}
    for d in devices:
        known = profile.device(d.name)
        sort = (d.kind, d.memory, known.slowdown, known.sharers, known.crowding, known.peaks)
        sorts.setdefault(sort, []).append((_layer_ns(problem, profile, d), d.name))
    out: dict[str, int] = {}
    kind = -1
    for members in sorts.values():
        fastest = 0.0
        for time, name in sorted(members):
            if time > fastest * (1 + NOISE):
                kind, fastest = kind + 1, time
            out[name] = kind
    return out


def _layer_ns(problem: Problem, profile: Profile, d: Device) -> float:
    """One whole layer of the batch that settles."""
    model, memory = problem.model, problem.memory
    costs = DeviceCosts(profile.device(d.name), model, alone=False, dtype=memory.dtype, kv_dtype=memory.kv_dtype)
    shape = problem.demand.settled(min(problem.max_num_seqs, 32))
    rows = np.array([shape.tokens])
    own = costs.attention_rows(rows, model.heads, model.kv_heads) + costs.ffn_rows(rows, model.ffn)
    attention = costs.pair_ns(model.heads) * shape.prefill_pairs
    attention += costs.key_ns(model.heads, model.kv_heads) * shape.decode_context
    return float(own[0]) + attention
