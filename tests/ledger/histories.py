"""Random legal histories of a plan: what a brain tells and bodies report, and an independent reading of them.

Times are small integers, so that the reading may look at every nanosecond by itself.
"""

import random
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

from hypothesis import strategies as st

from evener.cost.base import BatchShape
from evener.ledger.causes import Cause
from evener.ledger.ledger import Ledger
from evener.ledger.spans import HoldKind, MakeUp, Op, Span, Traffic
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds

START = 1_000


class Costs:
    """A prompt token takes as long as two decoding rows; a batch takes 10 more."""

    version = 0

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        return Nanoseconds(10 + 2 * shape.prefill_tokens + shape.decode_rows if shape.tokens else 0)

    batch_ns = latency_ns = stage_ns  # type: ignore[assignment]

    def error(self) -> None:
        return None


class Case(NamedTuple):
    """One random situation; everything follows from it."""

    seed: int
    replicas: int
    stages: int
    ranks: int
    batches: int
    fails: bool
    mixed: bool


cases = st.builds(
    Case,
    seed=st.integers(0, 100_000),
    replicas=st.integers(1, 3),
    stages=st.integers(1, 3),
    ranks=st.integers(1, 2),
    batches=st.integers(0, 12),
    fails=st.booleans(),
    mixed=st.booleans(),
)


class Fact(NamedTuple):
    """One call of the journal, or of a body."""

    at: int
    what: str
    args: tuple[object, ...]


class BatchLife(NamedTuple):
    issued: int
    done: int | None
    """None: lost."""
    made_of: MakeUp
    late: int
    spans: list[Span]


class History(NamedTuple):
    facts: list[Fact]
    spans: list[Span]
    """In an order in which they may come."""
    batches: list[list[BatchLife]]
    """By replica."""
    states: list[list[tuple[int, HoldKind, bool]]]
    waiting: list[tuple[int, bool]]
    up: list[int]
    down: list[int | None]
    now: int


def make_plan(case: Case) -> Plan:
    def stage(r: int, s: int) -> Stage:
        return Stage((s, s + 1), tuple(Shard(f"d{r}.{s}.{k}", (k, k + 1), (0, 1)) for k in range(case.ranks)))

    return Plan(
        tuple(Replica(tuple(stage(r, s) for s in range(case.stages))) for r in range(case.replicas)), epoch=3
    )  # fmt: skip


def make_of(rng: random.Random, mixed: bool) -> tuple[MakeUp, int]:
    """A make-up and the late rows among it."""
    prompt = rng.choice([0, rng.randint(1, 40)])
    rows = rng.randint(1, 8) if not prompt or mixed else 0
    if not mixed:
        return MakeUp(BatchShape(prefill_tokens=prompt, decode_rows=rows)), 0
    again = rng.randint(0, prompt)
    shape = BatchShape(prefill_tokens=prompt, decode_rows=rows, pad_tokens=rng.choice([0, rng.randint(0, 9)]))
    return MakeUp(shape, again), rng.choice([0, rng.randint(0, rows)])


def make_span(rng: random.Random, at: tuple[int, int, int], batch_id: int, began: int) -> Span:
    """A span of random parts that begins at `began`."""
    parts = [rng.choice([0, rng.randint(0, 20)]) for _ in range(7)]
    compute, contended, straggler, transfer, bubble, host, _ = (Nanoseconds(p) for p in parts)
    traffic = (Traffic(Op.ALL_REDUCE, 2, 64, straggler, transfer),) if transfer else ()
    return Span(
        *at, 3, batch_id, Nanoseconds(began), Nanoseconds(began + sum(parts)), compute, compute, contended, straggler,
        transfer, bubble, Nanoseconds(rng.choice([0, rng.randint(0, 9)])), host=host, traffic=traffic,
    )  # fmt: skip


def make_history(case: Case) -> History:
    rng = random.Random(case.seed)
    facts: list[Fact] = []
    batches: list[list[BatchLife]] = []
    states: list[list[tuple[int, HoldKind, bool]]] = []
    ups, downs = [], []
    for r in range(case.replicas):
        up = START + rng.randint(0, 50)
        down = up + rng.randint(0, 300) if case.fails and rng.random() < 0.7 else None
        free = {(s, k): up for s in range(case.stages) for k in range(case.ranks)}
        lives: list[BatchLife] = []
        issued = done = up
        for b in range(case.batches):
            issued += rng.choice([0, rng.randint(0, 60)])
            if down is not None and issued >= down:
                break
            spans = []
            for (s, k), at in free.items():
                span = make_span(rng, (r, s, k), b, max(at, issued) + rng.choice([0, rng.randint(0, 9)]))
                free[s, k] = span.ended
                spans.append(span)
            done = max(done, max(x.ended for x in spans)) + rng.choice([0, rng.randint(0, 9)])
            lost = down is not None and done >= down
            made_of, late = make_of(rng, case.mixed)
            if lost:
                spans = [x for x in spans if x.ended < (down or 0) or rng.random() < 0.5]
                late = 0
            lives.append(BatchLife(issued, None if lost else done, made_of, late, spans))
            if not lost and rng.random() < 0.4:
                issued = max(issued, done)
        batches.append(lives)
        ups.append(up)
        downs.append(down)
        end = down if down is not None else done + 100
        told = sorted(rng.randint(START, end) for _ in range(rng.randint(0, 6)))
        own = [(at, HoldKind(rng.choice([0, 0, 1, 2])), rng.random() < 0.5) for at in told if at < end]
        states.append(own)
        facts.append(Fact(up, "up", (r, up)))
        facts += [Fact(at, "state", (r, at, hold, work, False)) for at, hold, work in own]
        for b, life in enumerate(lives):
            facts.append(Fact(life.issued, "issued", (r, b, life.issued, life.made_of)))
            if life.done is not None:
                facts.append(Fact(life.done, "done", (r, b, life.done, life.late)))
        if down is not None:
            facts.append(Fact(down, "down", (r, down, "lost")))
    now = max([START, *(f.at for f in facts)]) + 50
    flips = sorted({rng.randint(START, now) for _ in range(rng.randint(0, 8))})
    waiting = [(at, k % 2 == 0) for k, at in enumerate(flips)]
    facts += [Fact(at, "waiting", (at, anybody)) for at, anybody in waiting]
    order = {"up": 0, "state": 1, "waiting": 2, "done": 3, "issued": 3, "down": 5}
    facts.sort(key=lambda f: (f.at, order[f.what]))
    spans = [x for lives in batches for life in lives for x in life.spans]
    return History(facts, spans, batches, states, waiting, ups, downs, now)


def play(case: Case, history: History, bundles: random.Random | None = None, *, settles: bool = True) -> Ledger:
    """A ledger that heard it all: each span right after its batch's issue, or in random bundles later on."""
    ledger = Ledger(make_plan(case), Costs(), start=Nanoseconds(START), resolution=Nanoseconds(40))
    queues: dict[tuple[int, int, int], list[Span]] = {}
    issued: set[tuple[int, int]] = set()

    def flush(key: tuple[int, int, int], most: int) -> None:
        queue = queues.get(key, [])
        while queue and most > 0 and (key[0], queue[0].batch_id) in issued:
            ledger.span(queue.pop(0))
            most -= 1

    for span in history.spans:
        queues.setdefault((span.replica, span.stage, span.rank), []).append(span)
    for fact in history.facts:
        if fact.what == "down":  # what is reported at all is reported before
            for key in [k for k in queues if k[0] == fact.args[0]]:
                flush(key, 99)
        getattr(ledger, fact.what)(*fact.args)
        if fact.what == "issued":
            issued.add(fact.args[:2])  # type: ignore[arg-type]
        keys = list(queues)
        if bundles is not None:
            bundles.shuffle(keys)
        for key in keys:
            flush(key, 99 if bundles is None else bundles.choice([0, 0, 0, 1, 3]))
        if settles and bundles is not None and bundles.random() < 0.1:
            ledger.settle(Nanoseconds(fact.at))
    for key in queues:
        flush(key, 99)
    ledger.settle(Nanoseconds(history.now))
    return ledger


# ---- the independent reading ------------------------------------------------------------------------------------


def explain(history: History, case: Case, r: int, s: int, k: int) -> Counter[Cause]:
    """Causes of every nanosecond of one device outside its spans, and the parts of these (compute left out)."""
    causes: Counter[Cause] = Counter()
    lives, down = history.batches[r], history.down[r]
    mine = [(b, x) for b, life in enumerate(lives) for x in life.spans if (x.stage, x.rank) == (s, k)]
    whole = [(b, x) for b, x in mine if down is None or x.ended <= down]
    for _, x in whole:
        for cause in (Cause.CONTENDED, Cause.STRAGGLER, Cause.TRANSFER, Cause.BUBBLE, Cause.HOST):
            causes[cause] += getattr(x, cause.label)
        causes[Cause.UNATTRIBUTED] += x.ended - x.began - (
            x.compute + x.contended + x.straggler + x.transfer + x.bubble + x.host
        )  # fmt: skip
    inside = {t for _, x in whole for t in range(x.began, x.ended)}
    for t in range(START, history.now):
        if t not in inside:
            causes[_cause_at(history, case, r, s, mine, whole, t)] += 1
    return causes


def _cause_at(
    history: History, case: Case, r: int, s: int, mine: list[tuple[int, Span]], whole: list[tuple[int, Span]], t: int
) -> Cause:
    lives, down = history.batches[r], history.down[r]
    if t < history.up[r] or (down is not None and t >= down):
        return Cause.DOWN
    following = next(((b, x) for b, x in mine if x.began > t and (down is None or x.began < down)), None)
    before = max((b for b, x in whole if x.ended <= t), default=-1)
    if down is not None:
        cut = next((x for _, x in mine if x.began <= t < x.ended), None)
        if cut is not None:
            return Cause.DOWN
        # Where nothing more is reported, what was in flight and lost makes the device down.
        if following is None and any(life.done is None and life.issued <= t for life in lives):
            return Cause.DOWN
    if following is not None and lives[following[0]].issued <= t:
        free = max([START, *(x.ended for _, x in whole if x.ended <= t)])
        contended = max(free, lives[following[0]].issued) + following[1].idle_contended
        return Cause.CONTENDED if t < contended else Cause.HOST
    hold, work = HoldKind.NONE, False
    for at, kind, unfinished in history.states[r]:
        if at <= t:
            hold, work = kind, unfinished
    if hold == HoldKind.KV:
        return Cause.KV_STARVED
    if hold == HoldKind.POLICY:
        return Cause.HELD
    if before >= 0 and t < _end(history, case, r, before):
        return Cause.STRAGGLER if s == case.stages - 1 else Cause.BUBBLE
    if work:
        return Cause.HOST
    anybody = next((a for at, a in reversed(history.waiting) if at <= t), False)
    return Cause.IMBALANCE if anybody else Cause.NO_DEMAND


def _end(history: History, case: Case, r: int, batch: int) -> float:
    last = [x.ended for x in history.batches[r][batch].spans if x.stage == case.stages - 1]
    return max(last) if len(last) == case.ranks else float("inf")


def windows(rng: random.Random, now: int) -> Iterator[tuple[int, int, int]]:
    """Some a <= b <= c."""
    for _ in range(6):
        a, b, c = sorted(rng.randint(START, now) for _ in range(3))
        yield a, b, c
