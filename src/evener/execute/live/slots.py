"""The state a worker keeps per sequence slot, changed by batches only.

Shape suffixes: N slots, P positions, M blocks per table, R sequences of a batch, T its rows, S its sampled rows.
"""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from evener.engine.batch import Batch, Chunk
from evener.engine.request import SamplingParams
from evener.model.inputs import Rows


class Sampling(NamedTuple):
    """Which rows of a batch are sampled, and for whom."""

    slots: list[int]
    positions: list[int]
    """Position that each sampled token will take in its sequence."""
    prompt: list[tuple[int, int, list[int]]]
    """(slot, first row among the extra rows, next tokens) for chunks that asked for prompt logprobs."""


class Slots:
    """Tokens, lengths, block tables and decode groups of one worker.

    `length_N` counts known tokens and those being sampled in flight, as the brain does.
    """

    def __init__(self, n_slots: int, max_len: int, block_tokens: int) -> None:
        self.block_tokens = block_tokens
        self.max_blocks = -(-max_len // block_tokens)
        self.tokens_NP = np.zeros((n_slots, max_len + 1), dtype=np.int64)
        self.length_N = np.zeros(n_slots, dtype=np.int64)
        self.prompt_N = np.zeros(n_slots, dtype=np.int64)
        self.tables_NM = np.zeros((n_slots, self.max_blocks), dtype=np.int32)
        self.n_blocks_N = np.zeros(n_slots, dtype=np.int64)
        self.params: dict[int, SamplingParams] = {}
        self.groups: dict[int, dict[int, None]] = {}

    def apply(self, batch: Batch) -> None:
        """Drops, new rows, table growth, leavers and joiners, in that order."""
        for slot in batch.drop:
            self.params.pop(slot, None)
        for row in batch.new:
            assert row.tokens is not None
            self.tokens_NP[row.slot, : row.n_tokens] = row.tokens
            self.length_N[row.slot] = row.n_tokens
            self.prompt_N[row.slot] = row.prompt_len
            self.n_blocks_N[row.slot] = 0
            self.params[row.slot] = row.sampling
        for slot, blocks in batch.tables:
            at = self.n_blocks_N[slot]
            self.tables_NM[slot, at : at + len(blocks)] = blocks
            self.n_blocks_N[slot] = at + len(blocks)
        if batch.group >= 0:
            group = self.groups.setdefault(batch.group, {})
            for slot in batch.leave:
                group.pop(slot, None)
            for slot in batch.join:
                group[slot] = None

    def decoding(self, batch: Batch) -> list[int]:
        """Slots of the decode rows of a batch, in order."""
        return list(self.groups[batch.group]) if batch.step else []

    def rows(self, batch: Batch) -> tuple[Rows, Sampling, NDArray[np.int64], NDArray[np.int64]]:
        """The batch flattened, what to sample, and (slots, positions) of its input tokens per row.

        Advances the lengths: call once per batch, after `apply`.
        """
        decode = np.fromiter(self.decoding(batch), dtype=np.int64)
        if not batch.chunks and not batch.pad_tokens:
            return self._decode_rows(decode)
        slots_R = np.concatenate([decode, np.fromiter((c.slot for c in batch.chunks), dtype=np.int64)])
        start_R = np.concatenate(
            [self.length_N[decode] - 1, np.fromiter((c.start for c in batch.chunks), dtype=np.int64)]
        )
        count_R = np.concatenate(
            [np.ones(len(decode), dtype=np.int64), np.fromiter((c.count for c in batch.chunks), dtype=np.int64)]
        )
        cu_R = np.zeros(len(slots_R) + 1, dtype=np.int64)
        np.cumsum(count_R, out=cu_R[1:])
        n_real = int(cu_R[-1])
        n_rows = n_real + batch.pad_tokens
        slots_T = np.repeat(slots_R, count_R)
        positions_T = np.arange(n_real) - np.repeat(cu_R[:-1] - start_R, count_R)
        block_T = self.tables_NM[slots_T, positions_T // self.block_tokens]
        kv_slot_T = block_T * self.block_tokens + positions_T % self.block_tokens
        longest = int((start_R + count_R).max(initial=0))
        tables_RM = self.tables_NM[slots_R, : max(1, -(-longest // self.block_tokens))]
        sampling, sample_rows = self._sampling(batch.chunks, decode, cu_R)
        self.length_N[decode] += 1
        for chunk in batch.chunks:
            if chunk.sample:
                self.length_N[chunk.slot] = chunk.start + chunk.count + 1
        rows = Rows(
            positions_T=_padded(positions_T, n_rows, 0, np.int32),
            cu_R=torch.from_numpy(cu_R.astype(np.int32)),
            start_R=torch.from_numpy(start_R.astype(np.int32)),
            tables_RM=torch.from_numpy(np.ascontiguousarray(tables_RM)),
            kv_slot_T=_padded(kv_slot_T, n_rows, -1, np.int32),
            sample_S=torch.from_numpy(sample_rows),
            n_rows=n_rows,
            n_real=n_real,
        )
        return rows, sampling, slots_T, positions_T

    def _decode_rows(self, decode: NDArray[np.int64]) -> tuple[Rows, Sampling, NDArray[np.int64], NDArray[np.int64]]:
        """`rows` of a batch that is one step of decoding rows: what comes of it in general, with less work."""
        n = len(decode)
        length = self.length_N[decode]
        positions = length - 1
        block, offset = np.divmod(positions, self.block_tokens)
        kv_slot = self.tables_NM[decode, block] * self.block_tokens + offset
        tables_RM = np.ascontiguousarray(self.tables_NM[decode, : max(1, int(block.max(initial=0)) + 1)])
        self.length_N[decode] = length + 1
        position_T = torch.from_numpy(positions.astype(np.int32))
        rows = Rows(
            positions_T=position_T, cu_R=torch.arange(n + 1, dtype=torch.int32), start_R=position_T,
            tables_RM=torch.from_numpy(tables_RM), kv_slot_T=torch.from_numpy(kv_slot.astype(np.int32)),
            sample_S=torch.arange(n), n_rows=n, n_real=n,
        )  # fmt: skip
        return rows, Sampling(decode.tolist(), length.tolist(), []), decode, positions

    def _sampling(
        self, chunks: list[Chunk], decode: NDArray[np.int64], cu_R: NDArray[np.int64]
    ) -> tuple[Sampling, NDArray[np.int64]]:
        slots = decode.tolist()
        positions = self.length_N[decode].tolist()
        rows = list(range(len(decode)))
        extra: list[int] = []
        prompt: list[tuple[int, int, list[int]]] = []
        for k, chunk in enumerate(chunks, start=len(decode)):
            end = chunk.start + chunk.count
            if chunk.sample:
                slots.append(chunk.slot)
                positions.append(end)
                rows.append(int(cu_R[k + 1]) - 1)
            if self.params[chunk.slot].prompt_logprobs is not None:
                last = min(end, int(self.prompt_N[chunk.slot]) - 1)
                if last > chunk.start:
                    following = self.tokens_NP[chunk.slot, chunk.start + 1 : last + 1].tolist()
                    prompt.append((chunk.slot, len(extra), following))
                    extra += range(int(cu_R[k]), int(cu_R[k]) + last - chunk.start)
        return Sampling(slots, positions, prompt), np.array(rows + extra, dtype=np.int64)

    def note(self, slots: list[int], positions: list[int], tokens: NDArray[np.int64]) -> None:
        """Sampled tokens became known."""
        self.tokens_NP[slots, positions] = tokens


def _padded(values: NDArray[np.int64], size: int, fill: int, dtype: type[np.int32]) -> torch.Tensor:
    out = np.full(size, fill, dtype=dtype)
    out[: len(values)] = values
    return torch.from_numpy(out)
