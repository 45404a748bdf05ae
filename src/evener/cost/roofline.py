"""A cost model from measured rates: per phase the slowest shard, plus the collectives between phases. Pure.

A *phase* is what a stage computes between two collectives, so its time is that of its slowest shard:

    embed | attention block | FFN block |  ... per layer ...  | head on the sampled rows

A GEMM costs its weights times the measured time per weight at so many rows, and at least one reading of the
weights (the roofline of Williams et al., 2009). Attention costs its (query, key) pairs at the measured flop rate in
prefill, and the bytes of K and V it reads in decode. Everything that depends on the number of rows alone is put in
tables when the model is made, so that a prediction is a few look-ups.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from evener.cost.base import BatchShape, DecodeRun, ShardTime, stepwise_run
from evener.cost.rates import DeviceProfile, Floats, Profile
from evener.errors import InvalidInput
from evener.spec.cluster import Link
from evener.spec.links import Links
from evener.spec.model import DTYPE_BYTES, ModelSpec, kv_token_bytes
from evener.spec.plan import Plan, Replica, Shard, Stage, size
from evener.units import Nanoseconds

ACTIVATION_BYTES = 4
"""Activations and collectives are fp32, but for GPUs that compute in 16 or 8 bits: theirs take two bytes."""
CANDIDATE_BYTES = 16
"""What a rank sends per sampled row when the head is split: value, index, logsumexp."""
ATTENTION_OPS, FFN_OPS, EMBED_OPS, HEAD_OPS, CHUNK_OPS = 5, 4, 2, 4, 4
"""Operators started per phase; `CHUNK_OPS` per prefill chunk and batch, for its index tensors."""
MAX_ROWS = 4096
"""Rows that tables cover; longer batches cost in proportion."""


class DeviceCosts:
    """Times of the phases on one device, in float nanoseconds; `rows` may be an array."""

    def __init__(
        self, device: DeviceProfile, model: ModelSpec, *, alone: bool, dtype: str = "fp32", kv_dtype: str = "fp32"
    ) -> None:
        for what, given in (("dtype", dtype), ("kv_dtype", kv_dtype)):
            if given not in DTYPE_BYTES:
                raise InvalidInput(f"{what}={given!r} is not one of {', '.join(DTYPE_BYTES)}")
        self.model, self.dtype, self.rates = model, dtype, device.rates(alone)
        self.stretch = device.stretch(alone)
        self.lost = device.lost(alone)
        self.kv_bytes = kv_token_bytes(model.head_dim, kv_dtype)
        self.attention = self.rates.attention_over(kv_dtype)
        self.activation_bytes = 2 if device.kind == "cuda" and dtype != "fp32" else ACTIVATION_BYTES

    def _phase(self, rows: NDArray[np.int64], weights: int, values_per_row: int, ops: int) -> Floats:
        """GEMMs over `weights` elements, elementwise traffic of `values_per_row`, and `ops` operator starts."""
        if weights == 0:
            return _none(rows)
        elementwise = rows * (values_per_row * self.activation_bytes / self.rates.read_bandwidth * 1e9)
        time = self.rates.gemm_ns(self.dtype, rows) * weights + elementwise + ops * self.rates.op_ns
        out: Floats = np.where(rows > 0, time * self.stretch, 0.0)
        return out

    def attention_rows(self, rows: NDArray[np.int64], heads: int, kv_heads: int) -> Floats:
        """One layer's attention block without attention itself: norm, q, k, v and o projections."""
        wide = self.model.head_dim * (2 * heads + 2 * kv_heads)
        return self._phase(rows, self.model.hidden * wide, 4 * self.model.hidden + wide, ATTENTION_OPS)

    def pair_ns(self, heads: int) -> float:
        """One layer's prefill attention, per (query token, key) pair."""
        return heads * 4 * self.model.head_dim / self.attention.flops * 1e9 * self.stretch

    def key_ns(self, heads: int, kv_heads: int) -> float:
        """One layer's decode attention, per key read by a decoding row: bound by bytes or by flop."""
        read = kv_heads * 2 * self.kv_bytes / self.attention.bandwidth * 1e9
        return max(read * self.stretch, self.pair_ns(heads))

    def step_rows(self, rows: NDArray[np.int64]) -> Floats:
        """What the worker computes for a batch beside its operators, once a stage."""
        out: Floats = np.where(rows > 0, self.rates.step_ns * self.stretch, 0.0)
        return out

    def ffn_rows(self, rows: NDArray[np.int64], columns: int) -> Floats:
        """One layer's feed-forward block over `columns` of the intermediate size."""
        return self._phase(rows, 3 * self.model.hidden * columns, 4 * self.model.hidden + 3 * columns, FFN_OPS)

    def embed_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """Looking rows up: bytes only."""
        if vocabulary == 0:
            return _none(rows)
        copied = rows * (2 * self.model.hidden * self.activation_bytes / self.rates.read_bandwidth * 1e9)
        out: Floats = np.where(rows > 0, (copied + EMBED_OPS * self.rates.op_ns) * self.stretch, 0.0)
        return out

    def head_rows(self, rows: NDArray[np.int64], vocabulary: int) -> Floats:
        """Logits of `rows` sampled rows over `vocabulary` rows of the head, read once more to choose."""
        return self._phase(rows, self.model.hidden * vocabulary, 2 * vocabulary, HEAD_OPS)


def _none(rows: NDArray[np.int64]) -> Floats:
    return np.zeros(len(rows), dtype=np.float64)


def _slowest(times: Sequence[Floats]) -> Floats:
    slowest: Floats = np.max(np.stack(list(times)), axis=0)
    return slowest


def _table(times: Floats) -> list[int]:
    """Integer nanoseconds by row count, never falling."""
    return [int(t) for t in np.maximum.accumulate(np.rint(times))]


def _at(table: list[int], n: int) -> int:
    last = len(table) - 1
    return table[n] if n <= last else table[last] * n // last


class OwnTimes(NamedTuple):
    """What one shard computes by itself, over all layers of its stage."""

    attention: list[int]
    pair_ns: float
    key_ns: float
    by_rows: list[int]
    """FFN, embedding, and what the worker does beside."""
    by_sampled: list[int]
    chunk_ns: int
    lost: float
    """Share of the compute times that is waiting for others on the same hardware."""


class _Steps(NamedTuple):
    """What is the same for all decode steps of one stage with so many rows. Arrays have a row per shard."""

    host: int
    transfer: int
    fixed: int
    """Of the stage, without attention and `host`."""
    block: float
    key_ns: float
    rest: int
    """Of the first shard: its attention block, time per key, and what it computes besides at most."""
    blocks: Floats
    keys_ns: Floats
    rests: NDArray[np.int64]
    """Of all shards, where they are not alike."""
    slowest: tuple[Floats, Floats]
    """`blocks` and `keys_ns` of the shards that the stage may wait for."""


class _StageTables:
    """All that one stage costs, over all its layers, by counts."""

    __slots__ = (
        "alike", "by_rows", "by_sampled", "chunk_ns", "host_ns", "moving_rows", "moving_sampled", "own",
        "pipe_delay_ns", "shards", "sharing", "steps",
    )  # fmt: skip

    def __init__(
        self, stage: Stage, costs: list[DeviceCosts], profile: Profile, links: list[Link], pipe: list[Link], *,
        first: bool, last: bool,
    ) -> None:  # fmt: skip
        model, layers, ranks = costs[0].model, size(stage.layers), len(costs)
        rows = np.arange(MAX_ROWS + 1)

        def collective(nbytes: NDArray[np.int64]) -> Floats:
            time = profile.collective_ns(ranks, nbytes.astype(np.float64))
            return time + np.where(nbytes > 0, _links_ns(links, nbytes, ranks), 0.0) if ranks > 1 else time

        activations = rows * model.hidden * costs[0].activation_bytes
        ffn = [
            layers * c.ffn_rows(rows, size(sh.ffn)) + c.step_rows(rows)
            for c, sh in zip(costs, stage.shards, strict=True)
        ]
        moving = 2 * layers * collective(activations)
        # A worker that takes its own time for a batch (`step_ns`) waits for no host besides.
        self.host_ns = 0 if all(c.rates.step_ns > 0 for c in costs) else profile.host_ns
        whole = _slowest(ffn) + np.where(rows > 0, float(self.host_ns), 0.0)
        if first:
            embed = [c.embed_rows(rows, size(sh.embed_rows)) for c, sh in zip(costs, stage.shards, strict=True)]
            whole = whole + _slowest(embed)
            ffn = [a + b for a, b in zip(ffn, embed, strict=True)]
            moving = moving + collective(activations)
        if not last:
            send = profile.collective_ns(2, activations.astype(np.float64))
            moving = moving + send + _links_ns([_no_delay(link) for link in pipe], activations)
        self.by_rows = _table(whole + moving)
        self.moving_rows = _table(moving)
        """Of `by_rows`: collectives and sending."""
        self.by_sampled = self.moving_sampled = [0] * (MAX_ROWS + 1)
        head = [_none(rows)] * ranks
        if last:
            head = [c.head_rows(rows, size(sh.head_rows)) for c, sh in zip(costs, stage.shards, strict=True)]
            choice = collective(rows * CANDIDATE_BYTES)
            self.by_sampled, self.moving_sampled = _table(_slowest(head) + choice), _table(choice)
        self.shards: list[tuple[list[int], float, float]] = []
        """Per unlike shard: attention block by rows, nanoseconds per pair, nanoseconds per key; over all layers."""
        self.own: list[OwnTimes] = []
        for cost, sh, of_rows, of_sampled in zip(costs, stage.shards, ffn, head, strict=True):
            heads, kv = size(sh.heads), size(sh.kv_heads(model))
            block = _table(layers * cost.attention_rows(rows, heads, kv))
            attention = (block, layers * cost.pair_ns(heads), layers * cost.key_ns(heads, kv))
            if (heads or not self.shards) and attention not in self.shards:
                self.shards.append(attention)
            chunk_ns = round(CHUNK_OPS * cost.rates.op_ns * cost.stretch)
            self.own.append(OwnTimes(*attention, _table(of_rows), _table(of_sampled), chunk_ns, cost.lost))
        self.alike = all(own == self.own[0] for own in self.own)
        """Every shard takes as long as the first: an equal split over equal devices."""
        self.sharing = any(own.lost > 0 for own in self.own)
        """Some workers wait for others on their core."""
        self.steps: dict[int, _Steps] = {}
        """By rows, as they are asked for."""
        self.chunk_ns = max(round(CHUNK_OPS * c.rates.op_ns * c.stretch) for c in costs)
        self.pipe_delay_ns = 0 if last else round(max((link.delay for link in pipe), default=0.0) * 1e9)


def _links_ns(links: list[Link], nbytes: NDArray[np.int64], ranks: int = 2) -> Floats:
    """Declared delay and bandwidth of the slowest of these links, for messages of `nbytes`.

    An all-reduce takes log2(ranks) delays, and in one direction 2 (ranks - 1) / ranks of the message (Patarasu and
    Yuan, 2009); between two ranks that is one of each, as for a message sent.
    """
    delays, volume = math.ceil(math.log2(ranks)), nbytes * (2e9 * (ranks - 1) / ranks)
    times: list[Floats] = [_none(nbytes)]
    for link in links:
        times.append(np.asarray(volume / (link.bandwidth or math.inf) + delays * link.delay * 1e9, dtype=np.float64))
    return _slowest(times)


def _no_delay(link: Link) -> Link:
    """A pipe's delay is waited for by the message, not by the stage that sent it."""
    return Link(link.a, link.b, bandwidth=link.bandwidth)


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
        costs = {
            name: costs_of(profile.device(name), model, alone=alone, dtype=dtype, kv_dtype=kv_dtype)
            for name in plan.devices()
        }
        shared: dict[Any, _StageTables] = {}
        declared = Links(links)
        self._replicas = [_replica_tables(replica, costs, profile, declared, shared) for replica in plan.replicas]

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        """Time the slowest shard of the stage is busy with the batch, collectives included."""
        return Nanoseconds(_stage_ns(self._replicas[replica][stage], shape))

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> Sequence[ShardTime]:
        """How the time of the stage divides on each of its shards."""
        return _shards_ns(self._replicas[replica][stage], shape)

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        """`shards_ns` of consecutive decode steps, all at once."""
        st = self._replicas[replica][stage]
        known = st.steps.get(rows)
        if known is None:
            known = st.steps[rows] = _steps(st, rows)
        if known.fixed < known.transfer:  # rounding ate the whole of a stage that computes next to nothing
            return stepwise_run(self, replica, stage, rows, context, steps)
        # The same operations on the same doubles as in `_stage_ns`, so that no nanosecond differs.
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
            return Nanoseconds(_stage_ns(stages[0], shape))
        return Nanoseconds(max([_stage_ns(st, shape) for st in stages]))

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Sum over the stages, and the declared delays between them."""
        stages = self._replicas[replica]
        if len(stages) == 1:
            return Nanoseconds(_stage_ns(stages[0], shape))
        delay = sum([st.pipe_delay_ns for st in stages]) if shape.tokens else 0
        return Nanoseconds(sum([_stage_ns(st, shape) for st in stages]) + delay)

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


def _replica_tables(
    replica: Replica, costs: dict[str, DeviceCosts], profile: Profile, links: Links, shared: dict[Any, _StageTables]
) -> list[_StageTables]:  # fmt: skip
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
            shared[key] = _StageTables(stage, of_stage, profile, inside, onward, first=s == 0, last=s == last)
        out.append(shared[key])
    return out


def _stage_ns(st: _StageTables, shape: BatchShape) -> int:
    rows = shape.prefill_tokens + shape.decode_rows + shape.pad_tokens
    pairs, keys, sampled = shape.prefill_pairs, shape.decode_context, shape.sampled_rows
    attention = 0.0
    for table, pair_ns, key_ns in st.shards:
        block = table[rows] if rows <= MAX_ROWS else _at(table, rows)
        time = block + pair_ns * pairs + key_ns * keys
        if time > attention:
            attention = time
    fixed = st.by_rows[rows] if rows <= MAX_ROWS else _at(st.by_rows, rows)
    head = st.by_sampled[sampled] if sampled <= MAX_ROWS else _at(st.by_sampled, sampled)
    return fixed + int(attention) + head + shape.chunks * st.chunk_ns


def _steps(st: _StageTables, rows: int) -> _Steps:
    waited_for = [(_at(table, rows), key_ns) for table, _, key_ns in st.shards]
    rests = [_at(own.by_rows, rows) + _at(own.by_sampled, rows) for own in st.own]
    transfer = _at(st.moving_rows, rows) + _at(st.moving_sampled, rows)
    fixed = _stage_ns(st, BatchShape(decode_rows=rows, sampled_rows=rows)) - st.host_ns
    fixed -= max(block for block, _ in waited_for)
    return _Steps(
        host=st.host_ns,
        transfer=transfer,
        fixed=fixed,
        block=float(_at(st.own[0].attention, rows)),
        key_ns=st.own[0].key_ns,
        rest=fixed - transfer if len(rests) == 1 else min(rests[0], fixed - transfer),
        blocks=_column([_at(own.attention, rows) for own in st.own]),
        keys_ns=_column([own.key_ns for own in st.own]),
        rests=np.array([[rest] for rest in rests]),
        slowest=(_column([block for block, _ in waited_for]), _column([key_ns for _, key_ns in waited_for])),
    )


def _column(values: Sequence[float]) -> Floats:
    return np.array([[value] for value in values], dtype=np.float64)


def _shards_ns(st: _StageTables, shape: BatchShape) -> list[ShardTime]:
    whole = _stage_ns(st, shape)
    rows = shape.prefill_tokens + shape.decode_rows + shape.pad_tokens
    own = st.own
    if not rows:
        return [_shard_time((0, whole, 0, 0, 0))] * len(own)
    sampled = shape.sampled_rows
    inside = rows <= MAX_ROWS and sampled <= MAX_ROWS
    host = min(st.host_ns, whole)
    moving = (
        st.moving_rows[rows] + st.moving_sampled[sampled]
        if inside
        else _at(st.moving_rows, rows) + _at(st.moving_sampled, sampled)
    )
    slow = whole - host - moving
    if slow < 0:
        moving, slow = moving + slow, 0
    if len(own) == 1:
        contended = int(slow * own[0].lost)
        return [_shard_time((host, slow - contended, contended, 0, moving))]
    pairs, keys, chunks = shape.prefill_pairs, shape.decode_context, shape.chunks
    out: list[ShardTime] = []
    for block, pair_ns, key_ns, by_rows, by_sampled, chunk_ns, lost in own[:1] if st.alike else own:
        if inside:
            compute = int(block[rows] + pair_ns * pairs + key_ns * keys) + by_rows[rows] + by_sampled[sampled]
        else:
            compute = int(_at(block, rows) + pair_ns * pairs + key_ns * keys)
            compute += _at(by_rows, rows) + _at(by_sampled, sampled)
        compute += chunks * chunk_ns
        if compute > slow:
            compute = slow
        contended = int(compute * lost)
        out.append(_shard_time((host, compute - contended, contended, slow - compute, moving)))
    return out * len(own) if st.alike else out


def _shard_time(parts: tuple[int, int, int, int, int]) -> ShardTime:
    return tuple.__new__(ShardTime, parts)
