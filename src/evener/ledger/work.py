"""What the ledger asks to set useful seconds beside the peak. `evener.cost.work` answers."""

from typing import Protocol

from evener.cost.base import BatchShape


class Work(Protocol):
    """Operations and bytes of a batch on one shard, and what its device could do."""

    def of(self, replica: int, stage: int, rank: int, shape: BatchShape) -> tuple[float, float]:
        """Floating-point operations, and bytes read or written, of one batch on one shard."""
        ...

    def peak(self, device: str) -> tuple[float, float]:
        """Operations per second, and bytes per second."""
        ...
