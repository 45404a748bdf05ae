"""What a group of devices can be as one stage: its split, its time by layers, its memory by layers.

A stage's time is taken from the cost model itself, as a fixed part and a part per layer: two trial replicas with one
layer and two give both. Groups of equal devices are interchangeable, so each kind of group is priced once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Literal, NamedTuple

from msgspec import structs

from evener.cost.base import BatchShape, CostModel
from evener.cost.device import DeviceCosts
from evener.cost.rates import Profile, bind
from evener.plan.alike import kinds_exactly, kinds_nearly
from evener.plan.default import FFN_UNIT, split_stage
from evener.plan.problem import Problem
from evener.spec.cluster import Device
from evener.spec.links import Links
from evener.spec.memory import block_bytes, kv_limit, shares_memory, weight_bytes, workspace_bytes
from evener.spec.plan import Interval, Plan, Replica, Shard, Stage, head_unit, size, split_by_weight
from evener.units import NS_PER_S


class Split(NamedTuple):
    """How a group of several devices is divided: by speed, by memory (more KV room), half way between, or evenly."""

    by: Literal["speed", "both", "memory", "even"] = "speed"
    pace: tuple[tuple[float, float], ...] | None = None
    """Factors on the devices' times for (heads, columns): see `split_stage`. None: all 1."""


SPLITS = (Split("speed"), Split("both"), Split("memory"), Split("even"))
UNBOUNDED = 1 << 60
COST_MODELS = 64
"""Kept at a time; each holds times for thousands of batches."""
Group = tuple[str, ...]
"""Names of the devices of one stage."""


class Room(NamedTuple):
    """What one shard has room for."""

    both: int | None
    """Bytes for layers and KV together, where the device declares its memory."""
    kv: int | None
    """Bytes for KV alone, where that is bounded."""
    layer: int
    """Bytes of one layer's weights."""
    block: int
    """Bytes of one KV block in one layer."""

    def most_layers(self, blocks: int) -> int:
        """Layers that leave room for so many KV blocks."""
        most = UNBOUNDED
        if self.both is not None and self.layer + blocks * self.block:
            most = max(0, self.both // (self.layer + blocks * self.block))
        if self.kv is not None and blocks * self.block:
            most = min(most, self.kv // (blocks * self.block))
        return most

    def blocks(self, layers: int) -> int:
        """KV blocks beside so many layers, 0 when the layers do not fit; a shard without KV heads holds any number."""
        left = UNBOUNDED if self.both is None else self.both - layers * self.layer
        if left < 0:
            return 0
        if self.kv is not None:
            left = min(left, self.kv)
        return left // (layers * self.block) if self.block else UNBOUNDED


@dataclass
class StageOption:
    """One group in one place of a pipeline. Times and memory are linear in its layers."""

    shards: tuple[Shard, ...]
    costs: Callable[[], CostModel]
    """Of the two trial replicas; large, so that not all are kept."""
    at: int
    """Index of the stage within the two trial replicas."""
    rooms: tuple["Room", ...]
    """Per shard."""
    delay_ns: int = 0
    """Of the slowest link to the next stage."""
    _known: dict[BatchShape, tuple[int, int]] = field(default_factory=dict)

    def times(self, shape: BatchShape) -> tuple[int, int]:
        """(nanoseconds without layers, nanoseconds per layer) for a batch."""
        got = self._known.get(shape)
        if got is None:
            costs = self.costs()
            one, two = costs.stage_ns(0, self.at, shape), costs.stage_ns(1, self.at, shape)
            got = self._known[shape] = (2 * one - two, two - one)
        return got

    def most_layers(self, blocks: int) -> int:
        """Layers that leave room for so many KV blocks on every shard; 0 when not even one does."""
        return min(room.most_layers(blocks) for room in self.rooms)

    def blocks(self, layers: int) -> int:
        """KV blocks that fit beside so many layers: the fewest over the shards; a shard without KV heads holds any."""
        return min(room.blocks(layers) for room in self.rooms)


class Stages:
    """Prices groups of devices; `among` are the devices that work at the same time."""

    def __init__(self, problem: Problem, among: Sequence[Device], nearly: bool = False) -> None:
        """`nearly`: devices that are alike but for noise are of one kind, and priced as the first of it."""
        self.problem = problem
        self.among = tuple(among)
        self.profile: Profile = bind(problem.profile, among)
        self.devices = {d.name: d for d in among}
        self.order = {d.name: k for k, d in enumerate(among)}
        self._declared = Links(problem.cluster.links)
        self.kind = kinds_nearly(problem, self.profile, among) if nearly else kinds_exactly(self.profile, among)
        """Devices of the same kind are interchangeable but for their links."""
        self._options: dict[object, StageOption | None] = {}
        self._cuts: dict[object, tuple[Shard, ...]] = {}
        self._costs = lru_cache(COST_MODELS)(lambda plan: problem.costs(plan, self.among))
        self._shape = problem.demand.settled(min(problem.max_num_seqs, 32))

    def option(
        self, group: Group, *, first: bool, last: bool, onward: Group = (), by: Split = SPLITS[0]
    ) -> StageOption | None:
        """The group as a stage, in front of `onward`; None when it does not fit its memory."""
        kinds = tuple(self.kind[n] for n in group)
        onward_size = len(onward) if self.problem.cluster.links else 0
        inside, outward = self._links(group, group), self._links(group, onward)
        shards = self._split(group, kinds, first, last, by)
        parts = tuple((sh.heads, sh.ffn, sh.embed_rows, sh.head_rows) for sh in shards)
        key = (kinds, first, last, parts, inside, onward_size, outward, self._sharing(group, onward))
        if key not in self._options:
            self._options[key] = self._price(group, shards, first, last, onward)
        known = self._options[key]
        if known is None:
            return None
        delay = round(max((delay for delay, _ in outward), default=0.0) * NS_PER_S)
        return StageOption(shards, known.costs, known.at, known.rooms, delay, known._known)

    def _sharing(self, group: Group, onward: Group) -> tuple[bool, ...]:
        """Which of the group share hardware with another of it or of the stage behind: they wait for each other."""
        at = [self.profile.device(n).hardware or n for n in (*group, *onward)]
        return tuple(at.count(where) > 1 for where in at[: len(group)])

    def _links(self, a: Group, b: Group) -> tuple[tuple[float, float], ...]:
        """(delay, bandwidth) of the declared links between two groups, or inside one."""
        found = {(float(x.delay), x.bandwidth or 0.0) for x in self._declared.between(a, b)}
        return tuple(sorted(found))

    def _split(self, group: Group, kinds: tuple[int, ...], first: bool, last: bool, by: Split) -> tuple[Shard, ...]:
        key = (kinds, first, last, by)
        if key not in self._cuts:
            if by.by == "speed" or len(group) == 1:
                self._cuts[key] = self._split_by_speed(group, first, last, by.pace)
            else:
                self._cuts[key] = self._split_by_share(group, first, last, by)
        return tuple(structs.replace(sh, device=n) for sh, n in zip(self._cuts[key], group, strict=True))

    def _price(
        self, group: Group, shards: tuple[Shard, ...], first: bool, last: bool, onward: Group
    ) -> StageOption | None:
        rooms = self._rooms(shards)
        if min(room.most_layers(1) for room in rooms) < 1:
            return None
        replicas = []
        before = [Stage((0, 1), shards)] if not first and len(group) > 1 else []
        after = [] if last else [self._after(group, onward)]
        for n in (1, 2):
            replicas.append(Replica((*before, Stage((0, n), shards), *after)))
        return StageOption(shards, partial(self._costs, Plan(tuple(replicas))), len(before), rooms)

    def _after(self, group: Group, onward: Group) -> Stage:
        """A stage behind this one, so that the link to it is priced; which splits it has does not matter."""
        model = self.problem.model
        names = onward or group
        rest = tuple(Shard(n, (0, 0), (0, 0)) for n in names[1:])
        return Stage((0, 1), (Shard(names[0], (0, model.heads), (0, model.ffn), (0, 0), (0, model.vocab)), *rest))

    def _rooms(self, shards: tuple[Shard, ...]) -> tuple[Room, ...]:
        problem, model, memory = self.problem, self.problem.model, self.problem.memory
        rooms = []
        for shard in shards:
            none, one = Stage((0, 0), shards), Stage((0, 1), shards)
            outside = weight_bytes(shard, none, model, memory.dtype)
            layer = weight_bytes(shard, one, model, memory.dtype) - outside
            block = block_bytes(shard, one, model, memory)
            device = self.devices[shard.device]
            most = problem.host_bytes if shares_memory(device) else device.memory
            both = None if most is None else most - outside - workspace_bytes(shard, model, memory)
            rooms.append(Room(both, kv_limit(device, problem.kv_bytes), layer, block))
        return tuple(rooms)

    def _split_by_speed(
        self, group: Group, first: bool, last: bool, pace: Sequence[tuple[float, float]] | None
    ) -> tuple[Shard, ...]:
        model, memory = self.problem.model, self.problem.memory
        costs = [
            DeviceCosts(self.profile.device(n), model, alone=False, dtype=memory.dtype, kv_dtype=memory.kv_dtype)
            for n in group
        ]
        return split_stage(model, list(group), costs, self._shape, first=first, last=last, pace=pace)

    def _split_by_share(self, group: Group, first: bool, last: bool, by: Split) -> tuple[Shard, ...]:
        """Heads, columns and vocabulary rows in proportion to memory (evenly where none is declared), half way from
        that towards the split by speed, or evenly: slower, but with more KV room where the fast have little memory."""
        declared = [self.devices[n].memory for n in group]
        even = by.by == "even" or None in declared
        weights = [1.0 if even else float(m or 0) for m in declared]
        model, fast = self.problem.model, self._split_by_speed(group, first, last, by.pace)
        paces = by.pace or ((1.0, 1.0),) * len(group)

        def cut(total: int, multiple: int, by_speed: list[int], part: Literal[0, 1]) -> tuple[Interval, ...]:
            slowed = [w / p[part] for w, p in zip(weights, paces, strict=True)]
            shares = [w / sum(slowed) for w in slowed]
            if by.by == "both":
                shares = [(w + n / max(1, sum(by_speed))) / 2 for w, n in zip(shares, by_speed, strict=True)]
            return split_by_weight(total, shares, multiple)

        heads = cut(model.heads, head_unit(model), [size(sh.heads) for sh in fast], 0)
        ffn = cut(model.ffn, model.ffn_unit, [size(sh.ffn) for sh in fast], 1)
        ends = [max(size(sh.embed_rows), size(sh.head_rows)) for sh in fast]
        vocab = cut(model.vocab, FFN_UNIT if model.vocab >= FFN_UNIT * len(group) else 1, ends, 1)
        none = (0, 0)
        return tuple(
            Shard(n, heads[k], ffn[k], vocab[k] if first else none, vocab[k] if last else none)
            for k, n in enumerate(group)
        )
