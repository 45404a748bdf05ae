"""What one stage costs over all its layers, in tables by row count: the sums over shards, and the slowest. Pure."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from evener.cost.base import BatchShape, ShardTime
from evener.cost.device import CHUNK_OPS, DeviceCosts, no_time
from evener.cost.rates import Floats, Profile
from evener.spec.cluster import Link
from evener.spec.plan import Stage, size

CANDIDATE_BYTES = 16
"""What a rank sends per sampled row when the head is split: value, index, logsumexp."""
MAX_ROWS = 4096
"""Rows that tables cover; longer batches cost in proportion."""


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


class Steps(NamedTuple):
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


class StageTables:
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
        published = all(c.published for c in costs)

        def collective(nbytes: NDArray[np.int64]) -> Floats:
            time = profile.collective_ns(ranks, nbytes.astype(np.float64), published)
            return time + np.where(nbytes > 0, _links_ns(links, nbytes, ranks), 0.0) if ranks > 1 else time

        activations = rows * model.hidden * costs[0].activation_bytes
        ffn = [
            layers * c.ffn_rows(rows, size(sh.ffn)) + c.step_rows(rows)
            for c, sh in zip(costs, stage.shards, strict=True)
        ]
        moving = 2 * layers * collective(activations)
        uneven = 1.0 + profile.uneven if ranks > 1 else 1.0
        # A worker that takes its own time for a batch (`step_ns`) waits for no host besides.
        self.host_ns = 0 if all(c.rates.step_ns > 0 for c in costs) else profile.host_ns
        whole = uneven * _slowest(ffn) + np.where(rows > 0, float(self.host_ns), 0.0)
        if first:
            embed = [c.embed_rows(rows, size(sh.embed_rows)) for c, sh in zip(costs, stage.shards, strict=True)]
            whole = whole + uneven * _slowest(embed)
            ffn = [a + b for a, b in zip(ffn, embed, strict=True)]
            moving = moving + collective(activations)
        if not last:
            send = profile.collective_ns(2, activations.astype(np.float64), published)
            moving = moving + send + _links_ns([_no_delay(link) for link in pipe], activations)
        self.by_rows = _table(whole + moving)
        self.moving_rows = _table(moving)
        """Of `by_rows`: collectives and sending."""
        self.by_sampled = self.moving_sampled = [0] * (MAX_ROWS + 1)
        head = [no_time(rows)] * ranks
        if last:
            head = [c.head_rows(rows, size(sh.head_rows)) for c, sh in zip(costs, stage.shards, strict=True)]
            choice = collective(rows * CANDIDATE_BYTES)
            self.by_sampled, self.moving_sampled = _table(uneven * _slowest(head) + choice), _table(choice)
        self.shards: list[tuple[list[int], float, float]] = []
        """Per unlike shard: attention block by rows, nanoseconds per pair, nanoseconds per key; over all layers, and
        with what ranks that are late in turns add."""
        self.own: list[OwnTimes] = []
        for cost, sh, of_rows, of_sampled in zip(costs, stage.shards, ffn, head, strict=True):
            heads, kv = size(sh.heads), size(sh.kv_heads(model))
            times = layers * cost.attention_rows(rows, heads, kv)
            attention = (_table(times), layers * cost.pair_ns(heads), layers * cost.key_ns(heads, kv))
            waited_for = (_table(uneven * times), uneven * attention[1], uneven * attention[2])
            if (heads or not self.shards) and waited_for not in self.shards:
                self.shards.append(waited_for)
            chunk_ns = round(CHUNK_OPS * cost.rates.op_ns * cost.stretch)
            self.own.append(OwnTimes(*attention, _table(of_rows), _table(of_sampled), chunk_ns, cost.lost))
        self.alike = uneven == 1.0 and all(own == self.own[0] for own in self.own)
        """Every shard takes as long as the first, and as the stage: an equal split over equal devices."""
        self.sharing = any(own.lost > 0 for own in self.own)
        """Some workers wait for others on their core."""
        self.steps: dict[int, Steps] = {}
        """By rows, as they are asked for."""
        self.chunk_ns = max(round(uneven * CHUNK_OPS * c.rates.op_ns * c.stretch) for c in costs)
        self.pipe_delay_ns = 0 if last else round(max((link.delay for link in pipe), default=0.0) * 1e9)


def _links_ns(links: list[Link], nbytes: NDArray[np.int64], ranks: int = 2) -> Floats:
    """Declared delay and bandwidth of the slowest of these links, for messages of `nbytes`.

    An all-reduce takes log2(ranks) delays, and in one direction 2 (ranks - 1) / ranks of the message (Patarasu and
    Yuan, 2009); between two ranks that is one of each, as for a message sent.
    """
    delays, volume = math.ceil(math.log2(ranks)), nbytes * (2e9 * (ranks - 1) / ranks)
    times: list[Floats] = [no_time(nbytes)]
    for link in links:
        times.append(np.asarray(volume / (link.bandwidth or math.inf) + delays * link.delay * 1e9, dtype=np.float64))
    return _slowest(times)


def _no_delay(link: Link) -> Link:
    """A pipe's delay is waited for by the message, not by the stage that sent it."""
    return Link(link.a, link.b, bandwidth=link.bandwidth)


def stage_ns(st: StageTables, shape: BatchShape) -> int:
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


def steps_of(st: StageTables, rows: int) -> Steps:
    waited_for = [(_at(table, rows), key_ns) for table, _, key_ns in st.shards]
    rests = [_at(own.by_rows, rows) + _at(own.by_sampled, rows) for own in st.own]
    transfer = _at(st.moving_rows, rows) + _at(st.moving_sampled, rows)
    fixed = stage_ns(st, BatchShape(decode_rows=rows, sampled_rows=rows)) - st.host_ns
    fixed -= max(block for block, _ in waited_for)
    return Steps(
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


def shards_ns(st: StageTables, shape: BatchShape) -> list[ShardTime]:
    whole = stage_ns(st, shape)
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
