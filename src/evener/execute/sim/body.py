"""The simulated body: the same brain, a virtual clock, and the cost model in place of workers.

A heap of events in integer nanoseconds. Events at the same time have a fixed order: arrivals, cancellations, failures,
slow-downs, timers, results; then by number (of the request, the timer, the replica). True output lengths are known
here and nowhere else: the brain learns of an end when the batch that samples it is done.

Use it like this; `Ledger` and `on_end` are optional:

    ledger = Ledger(plan, costs, start=Nanoseconds(0))
    brain = Brain(plan, kv_blocks, costs, BrainConfig(), journal=ledger)
    outcomes = Simulator(brain, costs, traffic, host_ns=300_000, ledger=ledger).run()

Traffic is read as it is needed, in order of arrival, so a generator of a million requests costs no memory. With
`on_end`, outcomes go there as requests end and are not kept. With `fast` (law 9), runs of decode steps in which nothing
can change skip the brain; outcomes, times, ledger and the brain's state are those of stepping, to the nanosecond.
"""

import heapq
from collections.abc import Callable, Iterable
from typing import NamedTuple

from evener.brain import Brain
from evener.cost.base import CostModel
from evener.engine.events import (
    Answer,
    Arrived,
    BatchDone,
    Cancelled,
    Command,
    Event,
    IssueBatch,
    Refuse,
    SetTimer,
    TimerFired,
    WorkerDown,
)
from evener.errors import InvalidTrace
from evener.execute.sim.forward import Runs
from evener.execute.sim.pipeline import Pipeline, SpanLedger, tell
from evener.execute.sim.traffic import Failure, Outcome, SimRequest, SlowDown
from evener.units import Nanoseconds

__all__ = ["Failure", "Outcome", "SimRequest", "Simulator", "SlowDown"]

ARRIVAL, CANCEL, FAILURE, SLOW_DOWN, TIMER, DONE = range(6)
"""Kinds of events; at one time, the earlier in this list comes first."""


class Moment(NamedTuple):
    """One event, in the order in which events happen."""

    at: int
    kind: int
    number: int
    """Tells events of one kind apart: the request's, the timer's, the replica's."""
    serial: int = 0
    """DONE: void unless the pipeline's `armed` is the same."""
    what: Event | SlowDown | None = None


class Simulator:
    """Runs a brain over traffic to its end."""

    def __init__(
        self,
        brain: Brain,
        costs: CostModel,
        traffic: Iterable[SimRequest],
        failures: Iterable[Failure] = (),
        host_ns: int = 0,
        *,
        slow_downs: Iterable[SlowDown] = (),
        ledger: SpanLedger | None = None,
        on_end: Callable[[Outcome], None] | None = None,
        fast: bool = True,
    ) -> None:
        """`host_ns`: time between a result and what the brain issues upon it, and between issue and start.

        `ledger` must be the brain's journal. `traffic` must be sorted by arrival (InvalidTrace, when it is read).
        """
        assert ledger is None or brain.journal is ledger, "the ledger must be the brain's journal"
        self.brain = brain
        self.now = Nanoseconds(0)
        self.outcomes: dict[str, Outcome] = {}
        """Of all requests; with `on_end`, of the unfinished ones."""
        self.events = 0
        """Consumed so far, skipped steps included."""
        self.truth: dict[str, int] = {}
        """Output lengths of unfinished requests."""
        self._ledger = ledger
        self._on_end = on_end
        self._traffic = iter(traffic)
        self._next: SimRequest | None = None
        self._arrived = 0
        self._heap: list[Moment] = []
        self._pipelines = [
            Pipeline(r, replica, costs, self.truth, host_ns, ledger is not None)
            for r, replica in enumerate(brain.plan.replicas)
        ]
        self._slowed: dict[str, list[SlowDown]] = {}
        for number, failure in enumerate(failures):
            self._push(Moment(failure.at, FAILURE, number, 0, WorkerDown(failure.device, "failed as planned")))
        varying = set()
        for number, slow in enumerate(slow_downs):
            self._push(Moment(slow.at, SLOW_DOWN, number, 0, slow))
            varying |= {p.index for p in self._pipelines if slow.device in p.devices}
        self._runs = Runs(brain, self._pipelines, ledger, varying) if fast else None
        if self._runs is not None:
            brain.touch = self._touch
        self._moment = Moment(0, ARRIVAL, -1)
        if ledger is not None:
            for r in range(len(self._pipelines)):
                ledger.up(r, Nanoseconds(0))
        self._read()

    # ---- running ----------------------------------------------------------------------------------------------

    def run(self) -> list[Outcome]:
        """Until nothing is left to happen. The outcomes, in order of arrival (none with `on_end`)."""
        while self.pending:
            self._advance()
        if self._ledger is not None:
            self._ledger.settle(self.now)
        return [] if self._on_end is not None else list(self.outcomes.values())

    @property
    def pending(self) -> bool:
        """Something is left to happen."""
        heap = self._heap
        while heap and heap[0].kind == DONE and self._pipelines[heap[0].number].armed != heap[0].serial:
            heapq.heappop(heap)
        return bool(heap) or self._next is not None

    def advance(self) -> list[Command]:
        """The next event (`pending` must be true), and what the brain made of it. Skipped steps give no commands."""
        assert self.pending
        return self._advance()

    def _advance(self) -> list[Command]:
        upcoming, heap = self._next, self._heap
        self.events += 1
        if upcoming is not None and (not heap or upcoming.arrival <= heap[0].at):
            return self._arrive(upcoming)
        moment = heapq.heappop(heap)
        self._moment = moment
        self.now = Nanoseconds(moment.at)
        if moment.kind == DONE:
            return self._done(moment.number)
        event = moment.what
        if isinstance(event, SlowDown):
            for pipeline, replica in zip(self._pipelines, self.brain.plan.replicas, strict=True):
                for s, stage in enumerate(replica.stages):
                    for k, shard in enumerate(stage.shards):
                        if shard.device == event.device:
                            pipeline.slow_down(s, k, event.factor)
            return []
        assert event is not None
        if isinstance(event, WorkerDown):
            return self._fail(event)
        return self._carry_out(self.brain.step(event, self.now))

    def catch_up(self) -> None:
        """Bring the brain's state up to `now`, where steps were skipped."""
        for pipeline in self._pipelines:
            self._touch(pipeline.index, True)

    # ---- events -----------------------------------------------------------------------------------------------

    def _read(self) -> None:
        """The next request, looked at ahead."""
        before = self._next
        self._next = next(self._traffic, None)
        if self._next is not None and before is not None and self._next.arrival < before.arrival:
            raise InvalidTrace(
                f"request {self._next.request.request_id} arrives at {self._next.arrival} ns, before the one in front "
                f"of it ({before.arrival} ns); sort the traffic by arrival"
            )

    def _arrive(self, item: SimRequest) -> list[Command]:
        request = item.request
        self._moment = Moment(item.arrival, ARRIVAL, self._arrived)
        self._arrived += 1
        self.now = item.arrival
        self.truth[request.request_id] = item.output_len
        self.outcomes[request.request_id] = Outcome(request.request_id, item.arrival, prompt_len=request.prompt_len)
        if item.cancel_at is not None and item.cancel_at >= item.arrival:
            self._push(Moment(item.cancel_at, CANCEL, self._arrived, 0, Cancelled(request.request_id)))
        self._read()
        return self._carry_out(self.brain.step(Arrived(request), self.now))

    def _done(self, index: int) -> list[Command]:
        pipeline = self._pipelines[index]
        if self._runs is not None:
            self.events += self._runs.finish(index)
        flight = pipeline.in_flight.popleft()
        if self._ledger is not None:
            tell(self._ledger, flight.spans)
        before = pipeline.armed
        commands = self._carry_out(self.brain.step(BatchDone(index, flight.result), self.now))
        if (self._runs is not None and self._runs.start(index)) or pipeline.armed == before:
            self._arm(pipeline)
        return commands

    def _fail(self, event: WorkerDown) -> list[Command]:
        hit = [p for p in self._pipelines if p.alive and event.device in p.devices]
        for pipeline in hit:
            self._touch(pipeline.index, True)
            pipeline.lose()
            self._arm(pipeline)
        return self._carry_out(self.brain.step(event, self.now))

    def _touch(self, index: int, changes: bool) -> None:
        """The brain is about to read (or change) a replica: catch up with the steps it was spared until now."""
        if self._runs is not None and self._runs.running(index):
            self.events += self._runs.catch_up(index, self._moment.at, self._moment.kind == DONE, self._moment.number)
            if changes:
                self._runs.stop(index)
                self._arm(self._pipelines[index])

    # ---- commands ---------------------------------------------------------------------------------------------

    def _carry_out(self, commands: list[Command]) -> list[Command]:
        for command in commands:
            if isinstance(command, IssueBatch):
                pipeline = self._pipelines[command.replica]
                pipeline.issue(self.now, command.batch)
                if len(pipeline.in_flight) == 1:
                    self._arm(pipeline)
            elif isinstance(command, Answer):
                outcome = self.outcomes[command.request_id]
                outcome.tokens += command.count
                if outcome.first_token is None and command.count:
                    outcome.first_token = self.now
                if command.finish is not None:
                    self._end(outcome, command.finish)
            elif isinstance(command, Refuse):
                self._end(self.outcomes[command.request_id], command.code)
            elif isinstance(command, SetTimer):
                at = max(command.at, self.now)
                self._push(Moment(at, TIMER, command.timer_id, 0, TimerFired(command.timer_id)))
        return commands

    def _end(self, outcome: Outcome, finish: str) -> None:
        assert not outcome.finish, f"{outcome.request_id} ended twice: {outcome.finish}, {finish}"
        outcome.ended, outcome.finish = self.now, finish
        self.truth.pop(outcome.request_id)
        if self._on_end is not None:
            self._on_end(self.outcomes.pop(outcome.request_id))

    def _push(self, moment: Moment) -> None:
        heapq.heappush(self._heap, moment)

    def _arm(self, pipeline: Pipeline) -> None:
        """Whatever comes next of this pipeline replaces what was to come."""
        pipeline.armed += 1
        at = self._runs.ends(pipeline.index) if self._runs is not None else None
        if at is None and pipeline.in_flight:
            at = pipeline.in_flight[0].done
        if at is not None:
            heapq.heappush(self._heap, Moment(at, DONE, pipeline.index, pipeline.armed))
