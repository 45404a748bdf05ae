"""HOW LONG: the contract of a cost model. Pure; integer nanoseconds; immutable versions."""

from typing import Protocol

from msgspec import Struct

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

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Time of the slowest stage: what a batch costs a full pipeline."""
        ...

    def latency_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        """Sum over the stages: what a batch costs a request that waits for it."""
        ...

    def error(self) -> float | None:
        """Median relative error against measured batches; None if never compared."""
        ...
