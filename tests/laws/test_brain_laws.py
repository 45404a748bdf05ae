"""The laws of the brain, over random plans, policies, traffic, cancellations and failures."""

from collections import Counter

import msgspec
from hypothesis import HealthCheck, given, settings
from tests.laws.traffic import (
    SLOTS,
    Case,
    SimpleCosts,
    cases,
    make_brain,
    make_ledger,
    make_plan,
    make_simulator,
    make_traffic,
)

from evener.brain import Brain, BrainConfig
from evener.engine.batch import BatchResult
from evener.engine.events import Arrived, BatchDone, Cancelled, Event, IssueBatch, Refuse
from evener.engine.request import Request
from evener.execute.live.record import Entry
from evener.execute.sim.body import SimRequest
from evener.units import Nanoseconds

law = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@law
@given(cases)
def test_law_1_conservation(case: Case) -> None:
    """Every accepted request ends exactly once, with the tokens that the truth and its cap allow."""
    simulator = make_simulator(case)
    outcomes = {o.request_id: o for o in simulator.run()}  # `run` asserts that nothing ends twice
    for item in make_traffic(case):
        outcome = outcomes[item.request.request_id]
        expected = min(item.output_len, item.request.max_tokens)
        assert outcome.finish in ("stop", "length", "cancelled")
        if outcome.finish == "cancelled":
            assert item.cancel_at is not None and outcome.tokens <= expected
        else:
            assert outcome.tokens == expected
            assert (outcome.finish == "length") == (item.request.max_tokens <= item.output_len)
    assert simulator.brain.unfinished == 0


@law
@given(cases)
def test_law_3_causality(case: Case) -> None:
    """No decision reads the future: until an end differs, two futures give the same commands."""

    def commands(longer: int) -> list[tuple[int, bytes]]:
        simulator = make_simulator(case, longer=longer)
        out = []
        while simulator.pending:
            for command in simulator.advance():
                out.append((simulator.now, msgspec.msgpack.encode(command)))
        return out

    one, two = commands(0), commands(1000)
    # The first end that only one future has is the first difference the brain may see.
    differs = next((k for k, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), None)
    if differs is not None:
        assert b"stop" in one[differs][1], "the futures part before any end was reported"


@law
@given(cases)
def test_law_4_determinism(case: Case) -> None:
    """The recorded events, written out and read back, give the same commands on a fresh brain."""
    recorded: list[bytes] = []
    brain = make_brain(case)
    original = brain.step

    def step(event: Event, now: int):  # type: ignore[no-untyped-def]
        result = original(event, now)  # type: ignore[arg-type]
        recorded.append(msgspec.msgpack.encode(Entry(now, event, result)))  # type: ignore[arg-type]
        return result

    brain.step = step  # type: ignore[method-assign]
    make_simulator(case, brain).run()
    fresh = make_brain(case)
    for data in recorded:
        entry = msgspec.msgpack.decode(data, type=Entry)
        assert msgspec.msgpack.encode(fresh.step(entry.event, entry.now)) == msgspec.msgpack.encode(entry.commands)


class _Workers:
    """What the workers of one replica believe, from batches alone, with every rule of block use checked."""

    def __init__(self, kv_blocks: int) -> None:
        self.kv_blocks = kv_blocks
        self.tables: dict[int, list[int]] = {}
        self.lengths: dict[int, int] = {}
        self.groups: dict[int, dict[int, None]] = {}

    def check(self, issued: IssueBatch) -> None:
        batch = issued.batch
        for slot in batch.drop:
            self.tables.pop(slot, None)
        for row in batch.new:
            assert 0 <= row.slot < SLOTS and row.slot not in self.tables, "a slot is taken before it is dropped"
            self.tables[row.slot], self.lengths[row.slot] = [], row.n_tokens
        for slot, blocks in batch.tables:
            self.tables[slot] += blocks
        group = self.groups.setdefault(batch.group, {})
        for slot in batch.leave:
            group.pop(slot, None)
        for slot in batch.join:
            group[slot] = None
        written = []
        if batch.step:
            assert len(group) == batch.shape.decode_rows, "workers and brain disagree on the rows of a group"
            for slot in group:
                written.append((slot, self.lengths[slot] - 1, self.lengths[slot]))
                self.lengths[slot] += 1
        for chunk in batch.chunks:
            written.append((chunk.slot, chunk.start, chunk.start + chunk.count))
            if chunk.sample:
                assert chunk.start + chunk.count == self.lengths[chunk.slot]
                self.lengths[chunk.slot] += 1
        held = Counter(b for table in self.tables.values() for b in set(table))
        assert all(0 <= b < self.kv_blocks for b in held)
        for slot, start, end in written:
            table = self.tables[slot]
            assert end <= len(table) * 16, "a position has no block"
            for block in table[start // 16 : -(-end // 16)]:
                assert held[block] == 1, f"block {block} has two holders and is written"


@law
@given(cases)
def test_law_5_kv_safety(case: Case) -> None:
    """A block has one writer, no block is outside the pool, and all blocks are free at the end."""
    simulator = make_simulator(case)
    workers = [_Workers(case.kv_blocks) for _ in range(case.replicas)]
    while simulator.pending:
        for command in simulator.advance():
            if isinstance(command, IssueBatch):
                workers[command.replica].check(command)
    for replica in simulator.brain.replicas:
        assert replica.pool.available == replica.pool.n_blocks
        assert not replica.active and not replica.in_flight


@law
@given(cases)
def test_law_8_work_conservation(case: Case) -> None:
    """A replica with work and nothing in flight says why it holds, and until when."""
    simulator = make_simulator(case)
    while simulator.pending:
        simulator.advance()
        for replica in simulator.brain.replicas:
            if replica.index in simulator.brain.down or replica.in_flight:
                continue
            if replica.running_rows() or replica.waiting_rows():
                hold = simulator.brain.held(replica.index)
                assert hold is not None, "idle with work and no reason"
                assert hold.until is not None and hold.until <= simulator.now + 100_000_000


@law
@given(cases)
def test_law_8_free_pipeline_is_filled(case: Case) -> None:
    """After every event, a pipeline with room has nothing left that could be issued without a Hold."""
    simulator = make_simulator(case)
    while simulator.pending:
        simulator.advance()
        for replica in simulator.brain.replicas:
            if replica.index in simulator.brain.down or simulator.brain.held(replica.index) is not None:
                continue
            if len(replica.in_flight) < replica.config.depth:
                stepable = [g for g in replica.groups if g.size and g.in_flight < 2]
                assert not replica.prefilling() and (not stepable or case.policy == "static")
                assert not (replica.waiting_rows() and len(replica.active) < SLOTS) or case.policy == "static"


def test_a_late_result_of_a_lost_replica_is_ignored() -> None:
    """Its sequences moved on when it was fenced."""
    case = Case(1, "equal-time", 1, 2, 400, 6, False, True)
    simulator = make_simulator(case)
    late = None
    while simulator.pending:
        commands = simulator.advance()
        for command in commands:
            if isinstance(command, IssueBatch) and command.replica == 0 and late is None:
                late = command
    assert late is not None and 0 in simulator.brain.down
    result = BatchDone(0, BatchResult(late.batch.batch_id, 0))
    assert simulator.brain.step(result, simulator.now) == []


def test_traffic_reaches_the_rare_paths() -> None:
    """The laws would be empty without preemption, prefix hits, cancellation and moves; they happen."""
    preempted = hits = 0
    for seed in range(20):
        simulator = make_simulator(Case(seed, "fcfs", 2, 1, 19, 40, False, False))
        simulator.run()
        preempted += sum(r.preemptions for r in simulator.brain.replicas)
        hits += sum(r.prefix_hit_tokens for r in simulator.brain.replicas)
    assert preempted > 20 and hits > 20
    assert any(t.cancel_at is not None for t in make_traffic(Case(3, "fcfs", 1, 1, 19, 40, True, False)))
    assert isinstance(make_traffic(Case(3, "fcfs", 1, 1, 19, 40, True, False))[0], SimRequest)


def test_max_queue_0_still_serves_what_can_start() -> None:
    """The limit is on waiting: with free slots nothing waits, and the first that would have to is refused."""
    case = Case(1, "equal-time", 1, 1, 400, 1, False, False)
    brain = make_brain(case)
    brain.config = msgspec.structs.replace(brain.config, max_queue=0)
    commands = []
    for k in range(SLOTS + 1):
        commands += brain.step(Arrived(Request(f"q{k}", 4, 4)), Nanoseconds(k))
    refused = [c for c in commands if isinstance(c, Refuse)]
    assert [r.request_id for r in refused] == [f"q{SLOTS}"] and refused[0].code == "overloaded"


def test_cancelled_requests_do_not_pile_up_behind_a_queue() -> None:
    """A client that retries for ever behind full slots leaves nothing behind."""
    brain = make_brain(Case(1, "fcfs", 1, 1, 400, 1, False, False))
    now = 0
    for k in range(40):
        brain.step(Arrived(Request(f"q{k}", 100, 100)), Nanoseconds(now))
    for k in range(3000):
        now += 1
        brain.step(Arrived(Request(f"c{k}", 100, 100)), Nanoseconds(now))
        brain.step(Cancelled(f"c{k}"), Nanoseconds(now))
    assert len(brain.replicas[0].waiting) < 200 and brain.unfinished == 40


def test_a_small_replica_takes_over_what_fits_it() -> None:
    """An idle replica looks past a waiting request that is too large for it."""
    config = BrainConfig(max_num_seqs=1, max_num_batched_tokens=64)
    brain = Brain(make_plan(1, 2), [400, 8], SimpleCosts(1), config)
    brain.down[1] = "not yet"  # everything arrives at the large one
    for name, prompt in (("a", 300), ("small", 20), ("large", 900)):
        brain.step(Arrived(Request(name, prompt, 50)), Nanoseconds(0))
    del brain.down[1]
    issued = brain.step(Cancelled("nobody"), Nanoseconds(1)) + brain.step(
        Arrived(Request("b", 900, 50)), Nanoseconds(2)
    )
    rows = [row.request_id for c in issued if isinstance(c, IssueBatch) and c.replica == 1 for row in c.batch.new]
    assert rows == ["small"]


def test_a_preempted_prompt_counts_once() -> None:
    """Counters of prompt tokens are what clients sent, however often a prompt was computed."""
    preempted = 0
    for seed in range(10):
        case = Case(seed, "fcfs", 1, 1, 19, 40, False, False)
        simulator = make_simulator(case)
        simulator.run()
        (replica,) = simulator.brain.replicas
        preempted += replica.preemptions
        assert replica.prompt_tokens == sum(t.request.prompt_len for t in make_traffic(case))
    assert preempted > 10


def test_names_of_preempted_requests_do_not_gather() -> None:
    """They are kept for the journal: once told, or where there is none, they are gone."""
    preempted = 0
    for seed in range(10):
        case = Case(seed, "fcfs", 1, 1, 19, 40, False, False)
        simulator = make_simulator(case, ledger=make_ledger(case) if seed % 2 else None)
        simulator.run()
        (replica,) = simulator.brain.replicas
        preempted += replica.preemptions
        assert not replica.newly_preempted
    assert preempted > 10


def test_static_batches_keep_to_the_token_budget() -> None:
    """A prompt longer than a batch may be, runs in pieces: workers have room for no more."""
    simulator = make_simulator(Case(5, "static", 1, 1, 400, 30, False, False))
    most = 0
    while simulator.pending:
        for command in simulator.advance():
            if isinstance(command, IssueBatch):
                most = max(most, command.batch.shape.tokens)
    assert max(t.request.prompt_len for t in make_traffic(Case(5, "static", 1, 1, 400, 30, False, False))) > 64 >= most
