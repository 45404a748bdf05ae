"""Puts one batch together. A policy says what goes in; the builder keeps slots, blocks and groups right."""

from __future__ import annotations

from typing import TYPE_CHECKING

from evener.cost.base import BatchShape
from evener.engine.batch import Batch, Chunk, NewRow
from evener.engine.sequence import DecodeGroup, Sequence, State

if TYPE_CHECKING:
    from evener.engine.replica import ReplicaEngine


class BatchBuilder:
    """Collects the rows of the next batch of one replica.

    Everything added takes its slot and blocks at once, so a policy sees what is left while it composes.
    """

    __slots__ = (
        "capped", "chunk_rows", "chunks", "decode_context", "decode_rows", "group", "new", "pad_tokens",
        "prefill_pairs", "prefill_tokens", "recompute_tokens", "replica", "sampled",
    )  # fmt: skip

    def __init__(self, replica: ReplicaEngine) -> None:
        self.replica = replica
        self.group: DecodeGroup | None = None
        self.decode_rows = 0
        self.decode_context = 0
        self.prefill_tokens = 0
        self.prefill_pairs = 0
        self.sampled = 0
        self.pad_tokens = 0
        self.recompute_tokens = 0
        self.chunks: list[Chunk] = []
        self.chunk_rows: list[Sequence] = []
        self.new: list[NewRow] = []
        self.capped: list[Sequence] = []

    def __bool__(self) -> bool:
        return self.decode_rows > 0 or bool(self.chunks)

    def shape(self) -> BatchShape:
        """The batch as composed so far."""
        return BatchShape(
            prefill_tokens=self.prefill_tokens,
            prefill_pairs=self.prefill_pairs,
            decode_rows=self.decode_rows,
            decode_context=self.decode_context,
            sampled_rows=self.decode_rows + self.sampled,
            pad_tokens=self.pad_tokens,
            chunks=len(self.chunks),
        )

    def shape_with(self, start: int, count: int, sample: bool) -> BatchShape:
        """The batch with one more chunk; nothing is changed."""
        return BatchShape(
            prefill_tokens=self.prefill_tokens + count,
            prefill_pairs=self.prefill_pairs + count * start + count * (count + 1) // 2,
            decode_rows=self.decode_rows,
            decode_context=self.decode_context,
            sampled_rows=self.decode_rows + self.sampled + sample,
            pad_tokens=self.pad_tokens,
            chunks=len(self.chunks) + 1,
        )

    def step(self, group: DecodeGroup) -> None:
        """Advance every row of a group by one token, letting its pending rows join first.

        A row that needs a KV block and finds none preempts the latest sequence (perhaps itself) and sits out.
        """
        replica = self.replica
        self.group = group
        for seq in list(group.pending) if group.pending else ():
            # A preemption for an earlier row takes the later ones off `pending`.
            if seq in group.pending and replica.extend(seq, seq.length):
                group.pending.remove(seq)
                group.join(seq)
        short = group.short_rows()
        if short and not replica.extend_all(short):
            for seq in sorted(short, key=lambda s: s.order):
                # It may have been preempted on behalf of an earlier row.
                if seq.group is group and not replica.extend(seq, seq.current_length()) and seq.group is group:
                    group.remove(seq)
                    group.pending.append(seq)
        self.capped = group.last_tokens()
        self.decode_rows = len(group.rows)
        self.decode_context = group.context

    def chunk(self, seq: Sequence, count: int) -> None:
        """Prefill the next `count` tokens of a sequence that holds its blocks."""
        assert 0 < count <= seq.left
        sample = count == seq.left
        self.chunks.append(Chunk(seq.slot, seq.computed, count, sample))
        self.chunk_rows.append(seq)
        self.prefill_tokens += count
        self.prefill_pairs += count * seq.computed + count * (count + 1) // 2
        self.sampled += sample
        if seq.redo > seq.computed:
            self.recompute_tokens += min(seq.computed + count, seq.redo) - seq.computed
        seq.computed += count

    def admit(self, seq: Sequence) -> None:
        """Announce a sequence that just took a slot to the workers."""
        self.new.append(
            NewRow(
                slot=seq.slot,
                tokens=None if seq.tokens is None else list(seq.tokens),
                n_tokens=seq.target,
                prompt_len=seq.request.prompt_len,
                sampling=seq.request.sampling,
                request_id=seq.request.request_id,
            )
        )

    def finish(self, batch_id: int, epoch: int) -> tuple[Batch, tuple[Sequence, ...]]:
        """The batch as data, and its sampled rows in the workers' order. Groups and sequences move on."""
        replica, group = self.replica, self.group
        stepping = group is not None and self.decode_rows > 0
        shape = self.shape()
        rows: tuple[Sequence, ...] = ()
        joining: list[int] = []
        leaving: list[int] = []
        if group is not None:
            rows = group.snapshot() if stepping else ()
            joining, leaving, group.joining, group.leaving = group.joining, group.leaving, [], []
            if stepping:
                group.advance(batch_id)
                group.in_flight += 1
            for seq in self.capped:
                group.remove(seq)
                seq.state = State.DRAINING
        for chunk, seq in zip(self.chunks, self.chunk_rows, strict=True):
            seq.last_batch = batch_id
            replica.publish(seq, seq.computed)
            if chunk.sample:
                rows += (seq,)
                replica.prefilled(seq, self)
        tables, replica.table_changes = replica.table_changes, {}
        drop, replica.dropped_slots = replica.dropped_slots, []
        batch = Batch(
            batch_id=batch_id,
            epoch=epoch,
            group=group.group_id if group is not None else -1,
            step=stepping,
            shape=shape,
            chunks=self.chunks,
            new=self.new,
            tables=list(tables.items()),
            join=joining,
            leave=leaving,
            drop=drop,
            pad_tokens=self.pad_tokens,
        )
        return batch, rows
