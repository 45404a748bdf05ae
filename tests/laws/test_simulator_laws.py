"""The laws of the simulated body: its ledger closes exactly, and fast-forward is stepping."""

from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from tests.laws.traffic import Case, cases, make_ledger, make_simulator, make_traffic

from evener.engine.replica import ReplicaEngine
from evener.execute.sim.body import Simulator
from evener.ledger.causes import N_CAUSES, Cause
from evener.ledger.ledger import Ledger

law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])

STEADY = Case(1, "fcfs", 1, 2, 400, 12, False, False, 2, "long")
"""Long answers, so that there are runs to skip."""


def totals(ledger: Ledger) -> dict[str, list[int]]:
    """Device -> nanoseconds by cause."""
    return {
        book.device: list(book.series.totals[:N_CAUSES])
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
            assert sum(causes) == simulator.now, device
            assert causes[Cause.UNATTRIBUTED] == 0 and min(causes) >= 0, (device, causes)


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
        "counts": (replica._next_batch, replica._completed, replica.preemptions, replica.output_tokens,
                   replica.prompt_tokens, replica.short_of_kv, replica.running_rows()),
        "free": list(replica._free_slots),
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
    from tests.laws.traffic import SimpleCosts, make_plan

    from evener.brain import Brain, BrainConfig
    from evener.errors import InvalidTrace

    traffic = make_traffic(Case(1, "fcfs", 1, 1, 400, 12, False, False))[::-1]
    brain = Brain(make_plan(1, 1), [400], SimpleCosts(1), BrainConfig())
    with pytest.raises(InvalidTrace, match="sort the traffic"):
        Simulator(brain, SimpleCosts(1), traffic).run()
