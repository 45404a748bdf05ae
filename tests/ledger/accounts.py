"""Small accounts for tests of what is read from them: a ledger that heard a few batches."""

from tests.ledger.histories import Costs

from evener.cost.base import BatchShape
from evener.ledger.ledger import Ledger
from evener.ledger.spans import HoldKind, MakeUp, Op, Span, Traffic
from evener.ledger.work import Work
from evener.spec.plan import Plan, Replica, Shard, Stage, split_even
from evener.units import Nanoseconds

MS = 1_000_000
DECODE = MakeUp(BatchShape(decode_rows=8, decode_context=800, sampled_rows=8))


def plan_of(*stages: tuple[int, int], replicas: int = 1, heads: int = 9, ffn: int = 1536) -> Plan:
    """Stages as (layers, ranks); device `d0.1.0` is replica 0, stage 1, rank 0."""

    def replica(r: int) -> Replica:
        at, out = 0, []
        for s, (layers, ranks) in enumerate(stages):
            parts = zip(split_even(heads, ranks), split_even(ffn, ranks, 64), strict=True)
            shards = tuple(Shard(f"d{r}.{s}.{k}", h, f) for k, (h, f) in enumerate(parts))
            out.append(Stage((at, at + layers), shards))
            at += layers
        return Replica(tuple(out))

    return Plan(tuple(replica(r) for r in range(replicas)))


class Teller:
    """Tells a ledger of equal batches, one after the other, times in milliseconds."""

    def __init__(self, plan: Plan, work: Work | None = None, *, keep_spans: int = 0) -> None:
        self.ledger = Ledger(plan, Costs(), start=Nanoseconds(0), work=work, keep_spans=keep_spans)
        self.plan = plan
        self.next = [0] * len(plan.replicas)
        for r in range(len(plan.replicas)):
            self.ledger.up(r, Nanoseconds(0))

    def state(self, at: float, replica: int = 0, *, hold: HoldKind = HoldKind.NONE, work: bool = True,
              short: bool = False) -> None:  # fmt: skip
        self.ledger.state(replica, Nanoseconds(round(at * MS)), hold, work, short)

    def batch(
        self, issued: float, spans: dict[tuple[int, int], tuple[float, float, dict[str, float]]], *, replica: int = 0,
        made_of: MakeUp = DECODE, late: int = 0, done: float | None = None, **more: object,
    ) -> None:  # fmt: skip
        """`spans`: (stage, rank) -> (began, ended, parts by name)."""
        number = self.next[replica]
        self.next[replica] += 1
        self.ledger.issued(replica, number, Nanoseconds(round(issued * MS)), made_of)
        for (s, k), (began, ended, parts) in spans.items():
            self.ledger.span(span(replica, s, k, number, began, ended, parts, **more))
        end = max(x[1] for x in spans.values()) if done is None else done
        self.ledger.done(replica, number, Nanoseconds(round(end * MS)), late)


def span(
    replica: int, stage: int, rank: int, batch: int, began: float, ended: float, parts: dict[str, float],
    **more: object,
) -> Span:  # fmt: skip
    """A span from milliseconds; `compute` is what the parts leave."""
    given = {name: round(value * MS) for name, value in parts.items()}
    whole = round(ended * MS) - round(began * MS)
    compute = given.pop("compute", whole - sum(v for k, v in given.items() if k != "idle_contended"))
    zero = dict.fromkeys(("contended", "straggler", "transfer", "bubble"), 0)
    fields = {**zero, **given, "compute": compute, "cpu": compute, **more}
    return Span(
        replica=replica, stage=stage, rank=rank, epoch=0, batch_id=batch, began=Nanoseconds(round(began * MS)),
        ended=Nanoseconds(round(ended * MS)), **fields,  # type: ignore[arg-type]
    )  # fmt: skip


def reduce(nbytes: int, count: int, waited: float, moving: float) -> tuple[Traffic, ...]:
    """All-reduces."""
    return (Traffic(Op.ALL_REDUCE, count, nbytes, Nanoseconds(round(waited * MS)), Nanoseconds(round(moving * MS))),)
