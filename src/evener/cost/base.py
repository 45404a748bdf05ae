"""HOW LONG: the contract of a cost model. Pure; integer nanoseconds; immutable versions."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from evener.units import Nanoseconds


class BatchShape(Struct, frozen=True, array_like=True):
    """Aggregates that a cost model needs; all counts are tokens or (query, key) pairs."""

    prefill_tokens: int = 0
    prefill_pairs: int = 0
    """Sum over chunks of count * start + count * (count + 1) / 2."""
    decode_rows: int = 0
    decode_context: int = 0
    """Sum over decode rows of the keys they read."""
    sampled_rows: int = 0
    pad_tokens: int = 0
    """Rows computed and thrown away (static policy)."""
    chunks: int = 0

    @property
    def tokens(self) -> int:
        """Rows that go through the GEMMs."""
        return self.prefill_tokens + self.decode_rows + self.pad_tokens


class ShardTime(NamedTuple):
    """What one shard does while its stage works on one batch: integer nanoseconds that sum to the stage's time."""

    host: int
    """Control time before the work begins; the same for every shard of the stage."""
    compute: int
    """Own work, a declared slow-down included."""
    contended: int
    """Waits for a core that other workers share."""
    straggler: int
    """Waits in collectives for slower shards."""
    transfer: int
    """Collectives once all have arrived, and sending to the next stage."""


class DecodeRun(NamedTuple):
    """Consecutive decode steps of one stage with the same rows: nothing grows but the context. Integer nanoseconds."""

    host: int
    """Of every step."""
    busy: NDArray[np.int64]
    """[steps]: the stage's time without `host`."""
    shards: NDArray[np.int64]
    """[ranks, 4, steps]: compute, contended, straggler, transfer; the four sum to `busy`."""


class CostModel(Protocol):
    """Predicts how long batches take on one plan's stages.

    Immutable: a refit makes a new object with a higher `version`, installed by an event.
    """

    version: int

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        """Time the slowest shard of the stage is busy with a batch of this shape, collectives included.

        Deterministic, never negative, non-decreasing in every field of `shape`. An empty shape costs 0.
        """
        ...

    def shards_ns(self, replica: int, stage: int, shape: BatchShape) -> Sequence[ShardTime]:
        """How `stage_ns` divides on each shard of the stage, by rank; every one sums to `stage_ns` exactly."""
        ...

    def decode_run(self, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
        """`shards_ns` of `steps` >= 1 consecutive decode steps: step k reads `context + k * rows` keys.

        Equal to calling `shards_ns` for each, to the nanosecond; `stepwise_run` does just that.
        """
        ...

    def delay_ns(self, replica: int, stage: int) -> Nanoseconds:
        """Declared delay of the pipe out of a stage: a message waits, the sender does not. 0 for the last stage."""
        ...

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Time of the slowest stage: what a batch costs a full pipeline."""
        ...

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Sum over the stages: what a batch costs a request that waits for it."""
        ...

    def error(self) -> float | None:
        """Median relative error against measured batches; None if never compared."""
        ...


def stepwise_run(costs: CostModel, replica: int, stage: int, rows: int, context: int, steps: int) -> DecodeRun:
    """`CostModel.decode_run` for models that have no faster way."""
    times = [
        costs.shards_ns(
            replica, stage, BatchShape(decode_rows=rows, decode_context=context + k * rows, sampled_rows=rows)
        )
        for k in range(steps)
    ]
    shards = np.array([[shard[1:] for shard in of_step] for of_step in times], dtype=np.int64).transpose(1, 2, 0)
    return DecodeRun(times[0][0].host, shards[0].sum(axis=0), shards)
