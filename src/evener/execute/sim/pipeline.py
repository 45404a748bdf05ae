"""One simulated replica: when each stage is free, what is in flight, and the spans that its devices would report.

A batch is handed to all workers at once, `host_ns` after it was issued. A stage begins with it when the one before is
done there; it waits for its input inside the batch (`bubble`; the declared delay of a link is `transfer`), as live
workers do. How the time of a stage divides on its shards is for the cost model to say.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from evener.cost.base import CostModel, ShardTime
from evener.engine.batch import Batch, BatchResult
from evener.execute.sim.rows import Rows
from evener.ledger.spans import Journal, Span
from evener.spec.plan import Replica
from evener.units import Nanoseconds

make_span: Callable[..., Span] = Span
"""Plain integers are nanoseconds here."""
ALL = -1
"""The rank of a span that all devices of its stage report."""


class SpanLedger(Journal, Protocol):
    """What the simulator tells besides what the brain does; `evener.ledger.ledger.Ledger` is one."""

    def span(self, span: Span) -> None:
        """A device did this."""
        ...

    def stage_span(self, span: Span) -> None:
        """All devices of a stage did this."""
        ...

    def up(self, replica: int, now: Nanoseconds) -> None:
        """A replica is ready."""
        ...

    def settle(self, now: Nanoseconds) -> None:
        """Everything before `now` was told."""
        ...


def tell(ledger: SpanLedger, spans: list[Span]) -> None:
    """Report spans, of single devices or (`ALL`) of whole stages."""
    for span in spans:
        if span.rank == ALL:
            ledger.stage_span(span)
        else:
            ledger.span(span)


class Flight:
    """A batch that was issued and whose result the brain has not seen."""

    __slots__ = ("done", "end", "plain", "result", "spans")

    def __init__(self, end: int, done: int, result: BatchResult, plain: bool, spans: list[Span]) -> None:
        self.end = end
        """When the last stage ends it."""
        self.done = done
        """When the brain hears of it."""
        self.result = result
        self.plain = plain
        """Decode rows only, of which none ends: what the brain learns from it depends on nothing that is known here."""
        self.spans = spans


class Pipeline:
    """What a replica's workers do with batches, in virtual time."""

    def __init__(
        self, index: int, replica: Replica, costs: CostModel, truth: dict[str, int], host_ns: int, recording: bool
    ) -> None:
        """`recording`: whether anybody wants spans."""
        self.index = index
        self.ranks = [len(stage.shards) for stage in replica.stages]
        self.devices = replica.devices()
        self.costs = costs
        self.host_ns = host_ns
        self.recording = recording
        self.free = [0] * len(replica.stages)
        self.delays = [int(costs.delay_ns(index, s)) for s in range(len(replica.stages))]
        self.rows = Rows(truth)
        self.in_flight: deque[Flight] = deque()
        self.alive = True
        self.armed = 0
        """Serial number of the event that ends the first flight (or the run)."""
        self.factors: dict[tuple[int, int], float] = {}
        """(stage, rank) -> present slow-down."""

    def issue(self, now: int, batch: Batch) -> None:
        """The brain issued a batch: work out when every stage does what, and put it in flight."""
        ended, at, group = self.rows.apply(batch)
        handed = now + self.host_ns
        spans: list[Span] = []
        free, shape, index = self.free, batch.shape, self.index
        delay = 0
        for stage in range(len(free)):
            shards = self.costs.shards_ns(index, stage, shape)
            if self.factors:
                shards = self._slowed(stage, shards)
            host, compute, contended, straggler, transfer = shards[0]
            began = (free[stage] if free[stage] > handed else handed) + host
            waits = at - began if at > began else 0
            end = began + waits + compute + contended + straggler + transfer
            if self.recording:
                late = waits if waits < delay else delay
                alike = shards.count(shards[0]) == len(shards) > 1
                for rank, (_, compute, contended, straggler, transfer) in enumerate(shards[:1] if alike else shards):
                    spans.append(
                        make_span(
                            index, stage, ALL if alike else rank, batch.epoch, batch.batch_id, began, end, compute,
                            compute, contended, straggler, transfer + late, waits - late,
                        )
                    )  # fmt: skip
            free[stage] = end
            delay = self.delays[stage]
            at = end + delay
        if group is not None:
            group.ready = end
        for chunk in batch.chunks:
            self.rows.slots[chunk.slot].ready = end
        plain = batch.step and not (batch.chunks or ended or batch.pad_tokens)
        result = BatchResult(batch.batch_id, batch.epoch, None, ended)
        self.in_flight.append(Flight(end, end + self.host_ns, result, plain, spans))

    def _slowed(self, stage: int, shards: Sequence[ShardTime]) -> list[ShardTime]:
        """A slower shard first uses up the time in which it waited for the others; what is left, they wait for it.

        Where ranks are slowest in turns, that is the least that a slow-down can cost: phases are not told apart here.
        """
        extra = [round(t.compute * (self.factors.get((stage, r), 1.0) - 1.0)) for r, t in enumerate(shards)]
        longer = max([0] + [e - t.straggler for e, t in zip(extra, shards, strict=True)])
        return [
            ShardTime(t.host, t.compute + e, t.contended, t.straggler + longer - e, t.transfer)
            for t, e in zip(shards, extra, strict=True)
        ]

    def lose(self) -> None:
        """A worker is lost and all are fenced: nothing in flight ever ends."""
        self.alive = False
        self.in_flight.clear()

    def slow_down(self, stage: int, rank: int, factor: float) -> None:
        """Compute of batches issued from now on takes `factor` times as long as the cost model says."""
        if factor == 1.0:
            self.factors.pop((stage, rank), None)
        else:
            self.factors[stage, rank] = factor
