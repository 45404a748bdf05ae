"""What the scheduler remembers of a batch until its result comes."""

from evener.cost.base import BatchShape
from evener.engine.sequence import DecodeGroup, Sequence
from evener.ledger.spans import MakeUp


class InFlight:
    """A batch that was issued and is not done."""

    __slots__ = ("batch_id", "capped", "group", "late", "made_of", "rows", "shape", "step")

    def __init__(
        self, batch_id: int, group: DecodeGroup | None, rows: tuple[Sequence, ...], capped: list[Sequence],
        shape: BatchShape, made_of: MakeUp,
    ) -> None:  # fmt: skip
        self.batch_id = batch_id
        self.group = group
        self.step = group.steps if group is not None else 0
        self.rows = rows
        self.capped = capped
        self.shape = shape
        self.made_of = made_of
        self.late = 0
        """Decode rows that ended before this batch was done: their tokens are thrown away."""
