"""The simulated body: the same brain, a virtual clock, and the cost model in place of workers.

A heap of events with a fixed order for ties, integer nanoseconds. True output lengths are known here and nowhere else:
the brain learns of an end when the batch that samples it is done.
"""

import heapq
from collections.abc import Iterable
from typing import NamedTuple

from msgspec import Struct

from evener.brain import Brain
from evener.cost.base import CostModel
from evener.engine.batch import Batch, BatchResult
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
from evener.engine.request import Request
from evener.units import Nanoseconds


class SimRequest(Struct, frozen=True):
    """A request, when it arrives, and the truth about it."""

    request: Request
    arrival: Nanoseconds
    output_len: int
    """The next token after this many is the end of sequence."""
    cancel_at: Nanoseconds | None = None


class Failure(Struct, frozen=True):
    """A device is lost at a given time."""

    device: str
    at: Nanoseconds


class Outcome(Struct):
    """What became of a request. Times are absolute nanoseconds."""

    request_id: str
    arrival: Nanoseconds
    first_token: Nanoseconds | None = None
    ended: Nanoseconds | None = None
    tokens: int = 0
    finish: str = ""
    """`stop`, `length`, `cancelled`, or the error code of a refusal."""


class _Row:
    """Executor's knowledge of one slot."""

    __slots__ = ("ends_after", "group", "joined_at", "ready", "sampled")

    def __init__(self, sampled: int, ends_after: int) -> None:
        self.sampled = sampled
        self.ends_after = ends_after
        self.group: _Group | None = None
        self.joined_at = 0
        self.ready = 0
        """When its newest token is known to the first stage."""


class _Group:
    __slots__ = ("ends", "ready", "slots", "steps")

    def __init__(self) -> None:
        self.steps = 0
        self.slots: dict[int, _Row] = {}
        self.ends: list[tuple[int, int]] = []
        """(step that samples the end of sequence, slot)."""
        self.ready = 0

    def let_go(self, slot: int) -> None:
        """A slot leaves; its row learns what it sampled here."""
        row = self.slots.pop(slot, None)
        if row is not None and row.group is self:
            row.sampled += self.steps - row.joined_at
            row.ready = max(row.ready, self.ready)
            row.group = None


class _Pipeline:
    """One replica: when each stage is free, and the state of its slots."""

    def __init__(self, stages: int) -> None:
        self.free = [0] * stages
        self.rows: dict[int, _Row] = {}
        self.groups: dict[int, _Group] = {}
        self.alive = True


class _Timed(NamedTuple):
    at: int
    order: int
    event: Event


class Simulator:
    """Runs a brain over traffic to its end."""

    def __init__(
        self,
        brain: Brain,
        costs: CostModel,
        traffic: Iterable[SimRequest],
        failures: Iterable[Failure] = (),
        host_ns: int = 0,
    ) -> None:
        """`host_ns`: time between a result and what the brain issues upon it, and between issue and start."""
        self.brain = brain
        self.costs = costs
        self.host_ns = host_ns
        self.now = Nanoseconds(0)
        self.outcomes: dict[str, Outcome] = {}
        self.issued: list[tuple[Nanoseconds, IssueBatch]] = []
        self._truth: dict[str, int] = {}
        self._heap: list[_Timed] = []
        self._order = 0
        self._pipelines = [_Pipeline(len(r.stages)) for r in brain.plan.replicas]
        for item in traffic:
            self._truth[item.request.request_id] = item.output_len
            self.outcomes[item.request.request_id] = Outcome(item.request.request_id, item.arrival)
            self._push(item.arrival, Arrived(item.request))
            if item.cancel_at is not None:
                self._push(item.cancel_at, Cancelled(item.request.request_id))
        for failure in failures:
            self._push(failure.at, WorkerDown(failure.device, "failed as planned"))

    def run(self) -> list[Outcome]:
        """Until nothing is left to happen."""
        while self._heap:
            self.advance()
        return list(self.outcomes.values())

    def advance(self) -> list[Command]:
        """The next event, and what the brain made of it."""
        timed = heapq.heappop(self._heap)
        self.now = Nanoseconds(timed.at)
        event = timed.event
        if isinstance(event, BatchDone) and not self._pipelines[event.replica].alive:
            return []
        if isinstance(event, WorkerDown):
            for pipeline, replica in zip(self._pipelines, self.brain.plan.replicas, strict=True):
                if event.device in replica.devices():
                    pipeline.alive = False
        commands = self.brain.step(event, self.now)
        for command in commands:
            if isinstance(command, IssueBatch):
                self.issued.append((self.now, command))
                self._issue(command.replica, command.batch)
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
                self._push(max(command.at, self.now), TimerFired(command.timer_id))
        return commands

    def _end(self, outcome: Outcome, finish: str) -> None:
        assert not outcome.finish, f"{outcome.request_id} ended twice: {outcome.finish}, {finish}"
        outcome.ended, outcome.finish = self.now, finish

    def _push(self, at: int, event: Event) -> None:
        self._order += 1
        heapq.heappush(self._heap, _Timed(at, self._order, event))

    def _issue(self, index: int, batch: Batch) -> None:
        pipeline = self._pipelines[index]
        ended, needs, group = self._track(pipeline, batch)
        at = max(self.now + self.host_ns, needs)
        for stage in range(len(pipeline.free)):
            at = max(at, pipeline.free[stage]) + self.costs.stage_ns(index, stage, batch.shape)
            pipeline.free[stage] = at
        if group is not None:
            group.ready = at
        for chunk in batch.chunks:
            pipeline.rows[chunk.slot].ready = at
        self._push(at + self.host_ns, BatchDone(index, BatchResult(batch.batch_id, batch.epoch, None, ended)))

    def _track(self, pipeline: _Pipeline, batch: Batch) -> tuple[list[tuple[int, int]], int, _Group | None]:
        """Apply a batch: (slots that end with their output lengths, when its input tokens are known, group stepped)."""
        for slot in batch.drop:
            pipeline.rows.pop(slot, None)
        for new in batch.new:
            pipeline.rows[new.slot] = _Row(new.n_tokens - new.prompt_len, self._truth[new.request_id])
        needs = 0
        ended: list[tuple[int, int]] = []
        group: _Group | None = None
        if batch.group >= 0:
            group = pipeline.groups.setdefault(batch.group, _Group())
            for slot in batch.leave:
                group.let_go(slot)
            for slot in batch.join:
                row = pipeline.rows[slot]
                if row.group is not None:  # its old group has had no batch to say so since
                    row.group.let_go(slot)
                row.group, row.joined_at = group, group.steps
                group.slots[slot] = row
                needs = max(needs, row.ready)
                heapq.heappush(group.ends, (group.steps + max(0, row.ends_after - row.sampled), slot))
            if batch.step:
                needs = max(needs, group.ready)
                while group.ends and group.ends[0][0] <= group.steps:
                    _, slot = heapq.heappop(group.ends)
                    found = group.slots.get(slot)
                    # A slot that left and came back has a stale entry beside its own.
                    if found is not None and found.sampled + group.steps - found.joined_at == found.ends_after:
                        found.ends_after = -1 - found.ends_after
                        ended.append((slot, -1 - found.ends_after))
                group.steps += 1
        for chunk in batch.chunks:
            if chunk.sample:
                row = pipeline.rows[chunk.slot]
                if row.sampled == row.ends_after:
                    ended.append((chunk.slot, row.ends_after))
                row.sampled += 1
        return ended, needs, group if batch.step else None
