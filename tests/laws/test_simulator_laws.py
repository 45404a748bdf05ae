"""The laws of the simulated body: its ledger closes exactly, and fast-forward is stepping."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from msgspec import structs
from tests.laws.traffic import AlikeCosts, Case, cases, make_ledger, make_plan, make_simulator, make_traffic

from evener.brain import Brain, BrainConfig
from evener.cost.base import BatchShape
from evener.engine.replica import ReplicaEngine
from evener.engine.sequence import State
from evener.execute.sim.body import Failure, Simulator, SlowDown
from evener.ledger.book import BATCHES, BUSY, CPU, DECODE_ROWS, DECODE_STEPS, PREFILL_TOKENS
from evener.ledger.causes import N_CAUSES, Cause
from evener.ledger.ledger import Ledger
from evener.ledger.spans import Span
from evener.units import Nanoseconds

law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

STEADY = Case(1, "fcfs", 1, 2, 400, 12, False, False, 2, "long")
"""Long answers, so that there are runs to skip."""


COUNTED = (*range(N_CAUSES), BATCHES, CPU, DECODE_ROWS, DECODE_STEPS, PREFILL_TOKENS, BUSY)
"""What does not depend on how many steps a span covers."""


def totals(ledger: Ledger) -> dict[str, list[int]]:
    """Device -> nanoseconds by cause, and counters."""
    return {
        book.device: [book.series.totals[k] for k in COUNTED]
        for replica in ledger._replicas
        for stage in replica.stages
        for book in stage
    }


@law
@given(cases)
@example(STEADY)
def test_law_2_ledger_closes(case: Case) -> None:
    """Simulated: every nanosecond of every device has one cause, exactly, and none is unexplained."""
    for fast in (False, True):
        ledger = make_ledger(case)
        simulator = make_simulator(case, ledger=ledger, fast=fast)
        simulator.run()
        for device, causes in totals(ledger).items():
            assert sum(causes[:N_CAUSES]) == simulator.now, device
            assert causes[Cause.UNATTRIBUTED] == 0 and min(causes) >= 0, (device, causes)


class OneByOne(Ledger):
    """Hears of every device by itself."""

    def stage_span(self, span: Span) -> None:
        for rank in range(len(self.plan.replicas[span.replica].stages[span.stage].shards)):
            self.span(structs.replace(span, rank=rank))


class Work:
    """Rank 1 of replica 1 has more to do."""

    def of(self, replica: int, stage: int, rank: int, shape: BatchShape) -> tuple[float, float]:
        return 1e9 * shape.tokens * (1 + rank * replica), 1e6 * shape.decode_context

    def peak(self, device: str) -> tuple[float, float]:
        return 1e12, 1e10


@law
@given(cases, st.booleans(), st.booleans(), st.sampled_from([None, Nanoseconds(20_000_000)]))
@example(STEADY, True, True, None)
def test_law_2_a_stage_is_its_devices(case: Case, slows: bool, works: bool, every: Nanoseconds | None) -> None:
    """Devices that do the same are accounted for once, until one does not: the account is that of telling each."""
    costs = AlikeCosts(case.stages, 3)
    plan = make_plan(case.stages, case.replicas, 3)
    slow_downs = [SlowDown(plan.devices()[-1], Nanoseconds(150_000_000), 1.5)] if slows else []
    failures = [Failure("d0.0", Nanoseconds(400_000_000))] if case.fails and case.replicas > 1 else []
    accounts = []
    for kind in (Ledger, OneByOne):
        work = Work() if works else None
        ledger = kind(plan, costs, start=Nanoseconds(0), work=work, resolution=every)
        brain = Brain(plan, [case.kv_blocks] * case.replicas, costs, BrainConfig(case.policy, max_num_seqs=8), ledger)
        simulator = Simulator(brain, costs, make_traffic(case), failures, 200_000, slow_downs=slow_downs, ledger=ledger)
        simulator.run()
        accounts.append(ledger.account())
        if every is not None:
            accounts[-1] = (
                accounts[-1],
                ledger.account(Nanoseconds(simulator.now // 3), Nanoseconds(simulator.now // 2)),
            )
        shared = [book.stands_for for r in ledger._replicas for book in r._kept]
        if kind is Ledger and not (slows or works or failures):
            assert set(shared) == {3}  # else the law would be empty
    assert accounts[0] == accounts[1]


def state_of(replica: ReplicaEngine) -> dict[str, Any]:
    """All that decides what a replica does next; KV blocks by number held, because which one is chance."""
    group_id = {None: -1, **{g: g.group_id for g in replica.groups}}
    return {
        "rows": {
            slot: (s.request.request_id, s.state, s.current_length(), s.computed, s.emitted, len(s.blocks), s.order,
                   group_id[s.group])
            for slot, s in replica.active.items()
        },
        "groups": [
            (g.steps, g.context, g.last_batch, g.in_flight, list(g.rows), [s.slot for s in g.pending], g.joining)
            for g in replica.groups
        ],
        "in_flight": [(f.batch_id, f.step, f.shape, f.made_of, f.late, [s.slot for s in f.rows])
                      for f in replica.in_flight],
        "available": replica.pool.available,
        "waiting": sorted(s.order for s in replica.waiting),
        "counts": (replica.next_batch_id, replica.completed_id, replica.preemptions, replica.output_tokens,
                   replica.prompt_tokens, replica.short_of_kv, replica.running_rows()),
        "free": list(replica.free_slots),
    }  # fmt: skip


def run_until(simulator: Simulator, at: int) -> None:
    """Every event before `at`."""
    while simulator.pending and next_at(simulator) < at:
        simulator.advance()


def next_at(simulator: Simulator) -> int:
    """When the next event comes."""
    assert simulator.pending
    times = [simulator._heap[0].at] if simulator._heap else []
    if simulator._next is not None:
        times.append(simulator._next.arrival)
    return min(times)


@law
@given(cases)
@example(STEADY)
def test_law_9_fast_forward(case: Case) -> None:
    """Skipping the brain where nothing can change gives the same outcomes, times and ledger, to the nanosecond."""
    slow_ledger, fast_ledger = make_ledger(case), make_ledger(case)
    slow = make_simulator(case, ledger=slow_ledger)
    fast = make_simulator(case, ledger=fast_ledger, fast=True)
    assert slow.run() == fast.run()
    assert slow.now == fast.now and slow.events == fast.events
    assert totals(slow_ledger) == totals(fast_ledger)
    for a, b in zip(slow.brain.replicas, fast.brain.replicas, strict=True):
        assert state_of(a) == state_of(b)
    assert slow.brain.lengths.state() == fast.brain.lengths.state()


@law
@given(cases)
@example(STEADY)
@example(Case(281, "equal-time", 1, 2, 25, 6, False, False, 1, "long"))  # who waited for blocks has gone elsewhere
def test_law_9_state_in_between(case: Case) -> None:
    """Whoever looks in the middle of a run sees the state of stepping."""
    slow, fast = make_simulator(case), make_simulator(case, fast=True)
    for item in make_traffic(case):
        for after in (1, 7_000_000, 40_000_001):
            at = item.arrival + after
            run_until(slow, at)
            run_until(fast, at)
            if fast._runs is not None:
                for k in [p.index for p in fast._pipelines if fast._runs.running(p.index)]:
                    fast._runs.catch_up(k, at, False, 0)
                    if (at + k) % 2:  # else the run goes on, and its batches in flight are not looked at
                        fast._runs.stop(k)
                        fast._arm(fast._pipelines[k])
            for a, b in zip(slow.brain.replicas, fast.brain.replicas, strict=True):
                one, two = state_of(a), state_of(b)
                if fast._runs is not None and fast._runs.running(a.index):
                    del one["in_flight"], two["in_flight"]
                assert one == two


def test_law_9_last_tokens() -> None:
    """A run may end with the step in which rows sample their last token; they are seen to drain as in stepping."""
    slow, fast = make_simulator(STEADY), make_simulator(STEADY, fast=True)
    runs = fast._runs
    assert runs is not None
    drained = at = 0
    while slow.pending:
        at += 1_000_000
        run_until(slow, at)
        run_until(fast, at)
        for replica, other in zip(slow.brain.replicas, fast.brain.replicas, strict=True):
            one, two = state_of(replica), state_of(other)
            if runs.running(other.index):
                runs.catch_up(other.index, at, False, 0)
                two = state_of(other)
                drained += any(seq.state is State.DRAINING for seq in other.active.values())
                del one["in_flight"], two["in_flight"]
            assert one == two
    assert drained > 10


def test_fast_forward_skips_most_steps() -> None:
    """The law would be empty without runs: with long answers, most results never reach the brain."""
    simulator = make_simulator(STEADY, fast=True)
    calls = 0
    step = simulator.brain.step

    def counted(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        return step(*args)

    simulator.brain.step = counted  # type: ignore[method-assign]
    simulator.run()
    assert calls < simulator.events / 2, (calls, simulator.events)


def test_unsorted_traffic_is_refused() -> None:
    """Times that go back would change the past."""
    from tests.laws.traffic import SimpleCosts

    from evener.errors import InvalidTrace

    traffic = make_traffic(Case(1, "fcfs", 1, 1, 400, 12, False, False))[::-1]
    brain = Brain(make_plan(1, 1), [400], SimpleCosts(1), BrainConfig())
    with pytest.raises(InvalidTrace, match="sort the traffic"):
        Simulator(brain, SimpleCosts(1), traffic).run()
