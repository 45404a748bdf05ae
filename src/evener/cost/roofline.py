"""A cost model from measured rates: per phase the slowest shard, plus the collectives between phases. Pure.

A *phase* is what a stage computes between two collectives, so its time is that of its slowest shard:

    embed | attention block | FFN block |  ... per layer ...  | head on the sampled rows

A GEMM costs its weights times the measured time per weight at so many rows, and at least one reading of the
weights (the roofline of Williams et al., 2009). Attention costs its (query, key) pairs at the measured flop rate in
prefill, and the bytes of K and V it reads in decode. Everything that depends on the number of rows alone is put in
tables when the model is made, so that a prediction is a few look-ups.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from msgspec import structs

from evener.cost.base import BatchShape, DecodeRun, ShardTime, stepwise_run
from evener.cost.device import DeviceCosts
from evener.cost.rates import LATE, DeviceProfile, Profile
from evener.cost.stage import OwnTimes, StageTables, shards_ns, stage_ns, steps_of
from evener.spec.cluster import Link
from evener.spec.links import Links
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard
from evener.units import Nanoseconds


class RooflineCostModel:
    """`CostModel` of one plan from a profile. Immutable; a prediction takes a few microseconds.

    Raises InvalidDevice when the profile lacks a device of the plan, InvalidInput when it lacks the dtype.
    """

    def __init__(
        self, model: ModelSpec, plan: Plan, profile: Profile, version: int = 0, *, dtype: str = "fp32",
        kv_dtype: str = "fp32", links: Sequence[Link] = (), measured_error: float | None = None,
        costs_of: Callable[..., DeviceCosts] = DeviceCosts,
    ) -> None:  # fmt: skip
        """`costs_of` makes the phases' times of one device, called like DeviceCosts: where they come from elsewhere."""
        self.version = version
        self.plan, self.profile = plan, profile
        self._error = measured_error
        self._made_of = (model, profile, dtype, kv_dtype, tuple(links), costs_of)
        alone = len(plan.devices()) == 1
        waiting = waiting_on_one_core(plan, profile)
        costs = {}
        for name in dict.fromkeys(plan.devices()):
            device = profile.device(name)
            if name in waiting:
                device = structs.replace(device, late=LATE)
            costs[name] = costs_of(device, model, alone=alone, dtype=dtype, kv_dtype=kv_dtype)
        shared: dict[Any, StageTables] = {}
        declared = Links(links)
        self._replicas = [_replica_tables(replica, costs, profile, declared, shared) for replica in plan.replicas]

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        """Time the slowest shard of the stage is busy with the batch, collectives included."""
        return Nanoseconds(stage_ns(self._replicas[replica][stage], shape))

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> Sequence[ShardTime]:
        """How the time of the stage divides on each of its shards."""
        return shards_ns(self._replicas[replica][stage], shape)

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        """`shards_ns` of consecutive decode steps, all at once."""
        st = self._replicas[replica][stage]
        known = st.steps.get(rows)
        if known is None:
            known = st.steps[rows] = steps_of(st, rows)
        if known.fixed < known.transfer:  # rounding ate the whole of a stage that computes next to nothing
            return stepwise_run(self, replica, stage, rows, context, steps)
        # The same operations on the same doubles as in `stage_ns`, so that no nanosecond differs.
        keys = np.arange(context, context + rows * steps, rows, dtype=np.float64)
        shards = np.zeros((len(st.own), 4, steps), dtype=np.int64)
        shards[:, 3] = known.transfer
        if st.alike:
            attention = (known.block + known.key_ns * keys).astype(np.int64)
            busy = attention + known.fixed
            shards[:, 0] = attention + known.rest
            shards[:, 2] = known.fixed - known.transfer - known.rest
        else:
            of_each = (known.blocks + known.keys_ns * keys).astype(np.int64)
            busy = (known.slowest[0] + known.slowest[1] * keys).max(axis=0).astype(np.int64) + known.fixed
            slow = busy - known.transfer
            np.minimum(of_each + known.rests, slow, out=shards[:, 0])
            np.subtract(slow, shards[:, 0], out=shards[:, 2])
        if st.sharing:
            lost = np.array([[own.lost] for own in st.own])
            shards[:, 1] = (shards[:, 0] * lost).astype(np.int64)
            shards[:, 0] -= shards[:, 1]
        return DecodeRun(known.host, busy, shards)

    def delay_ns(self, replica: int, stage: int) -> Nanoseconds:
        """Declared delay of the pipe out of a stage."""
        return Nanoseconds(self._replicas[replica][stage].pipe_delay_ns)

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Time of the slowest stage: what a batch costs a full pipeline."""
        stages = self._replicas[replica]
        if len(stages) == 1:
            return Nanoseconds(stage_ns(stages[0], shape))
        return Nanoseconds(max([stage_ns(st, shape) for st in stages]))

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Sum over the stages, and the declared delays between them."""
        stages = self._replicas[replica]
        if len(stages) == 1:
            return Nanoseconds(stage_ns(stages[0], shape))
        delay = sum([st.pipe_delay_ns for st in stages]) if shape.tokens else 0
        return Nanoseconds(sum([stage_ns(st, shape) for st in stages]) + delay)

    def error(self) -> float | None:
        """Median relative error against measured batches, as given; None if never compared."""
        return self._error

    def own_times(self, replica: int, stage: int, rank: int) -> OwnTimes:
        """What one shard computes by itself, by counts, over all layers of its stage: what a fit corrects."""
        return self._replicas[replica][stage].own[rank]

    def changed(
        self, version: int, change: Callable[[DeviceProfile, DeviceCosts], DeviceCosts], *, measured_error: float,
        profile: Callable[[Profile], Profile] = lambda p: p,
    ) -> "RooflineCostModel":  # fmt: skip
        """The same plan with changed times of its devices and a changed profile (of collectives and host)."""
        model, given, dtype, kv_dtype, links, costs_of = self._made_of

        def costs(device: DeviceProfile, *args: Any, **options: Any) -> DeviceCosts:
            return change(device, costs_of(device, *args, **options))

        return RooflineCostModel(
            model, self.plan, profile(given), version, dtype=dtype, kv_dtype=kv_dtype, links=links,
            measured_error=measured_error, costs_of=costs,
        )  # fmt: skip


def waiting_on_one_core(plan: Plan, profile: Profile) -> set[str]:
    """Slowed workers that share hardware with another of their replica."""
    found = set()
    for replica in plan.replicas:
        names = list(dict.fromkeys(replica.devices()))  # a plan to try prices with may name one twice
        at = [profile.device(n).hardware or n for n in names]
        found |= {n for n, where in zip(names, at, strict=True) if at.count(where) > 1}
    return {n for n in found if profile.device(n).slowdown > 1}


def _replica_tables(
    replica: Replica, costs: dict[str, DeviceCosts], profile: Profile, links: Links, shared: dict[Any, StageTables]
) -> list[StageTables]:  # fmt: skip
    """`shared`: tables made so far; a thousand equal replicas need them once."""

    def between(here: tuple[Shard, ...], there: tuple[Shard, ...]) -> list[Link]:
        return links.between([sh.device for sh in here], [sh.device for sh in there])

    last = len(replica.stages) - 1
    out = []
    for s, stage in enumerate(replica.stages):
        inside = between(stage.shards, stage.shards)
        onward = between(stage.shards, replica.stages[s + 1].shards) if s < last else []
        of_stage = [costs[sh.device] for sh in stage.shards]
        key = (
            stage.layers, s == 0, s == last,
            tuple((x.delay, x.bandwidth) for x in inside), tuple((x.delay, x.bandwidth) for x in onward),
            tuple((sh.heads, sh.ffn, sh.embed_rows, sh.head_rows) for sh in stage.shards),
            tuple((id(c.rates), c.stretch, c.lost) for c in of_stage),
        )  # fmt: skip
        if key not in shared:
            shared[key] = StageTables(stage, of_stage, profile, inside, onward, first=s == 0, last=s == last)
        out.append(shared[key])
    return out
