"""A fake engine whose ledger was told a short story."""

from fake import FakeCosts, FakeEngine

from evener.cost.base import BatchShape
from evener.ledger.ledger import Ledger
from evener.ledger.spans import HoldKind, MakeUp, Milestone, Op, Span, Traffic
from evener.units import Nanoseconds

S = 1_000_000_000


def ns(seconds: float) -> Nanoseconds:
    return Nanoseconds(round(seconds * S))


def told_engine() -> FakeEngine:
    """Two seconds of loading, one idle, then a request of one batch: 0.25 s late, 1 s of compute, 0.5 s of it lost."""
    made = FakeEngine()
    ledger = Ledger(made.plan, FakeCosts(), start=ns(10))
    ledger.up(0, ns(12))
    ledger.request("cmpl-1-0", 0, ns(13), Milestone.ARRIVED, 8)
    ledger.issued(0, 0, ns(13), MakeUp(BatchShape(prefill_tokens=8, prefill_pairs=36, sampled_rows=1, chunks=1)))
    ledger.request("cmpl-1-0", 0, ns(13), Milestone.ADMITTED, 0)
    ledger.state(0, ns(13), HoldKind.NONE, True, False)
    ledger.span(
        Span(0, 0, 0, 0, 0, ns(13.25), ns(15), ns(1), ns(1), ns(0.5), ns(0), ns(0.25), ns(0),
             traffic=(Traffic(int(Op.ALL_REDUCE), 3, 3000, ns(0), ns(0.25)),))
    )  # fmt: skip
    ledger.done(0, 0, ns(15), 0)
    ledger.request("cmpl-1-0", 0, ns(15), Milestone.FIRST_TOKEN, 1)
    ledger.request("cmpl-1-0", 0, ns(15), Milestone.ENDED, 1)
    ledger.state(0, ns(15), HoldKind.NONE, False, False)
    ledger.settle(ns(20))
    made.kept = ledger
    return made
