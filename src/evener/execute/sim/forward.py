"""Fast-forward (law 9): runs of decode steps in which nothing can change skip the brain.

A run begins when both batches in flight at a replica are plain decode steps of the same rows and its engine knows that
the next `n` would be the same (`engine.steady.steady_steps`: no row samples its last token before the last of them, KV
blocks suffice, nobody who waits could be admitted). It is bounded by the first true end too, which is known to the body
alone. The times of all its steps follow from the cost model at once.

Whoever reads the replica in between makes the brain catch up with the results that it would have seen by then
(`catch_up`), and the run goes on; whoever changes it ends the run (`stop`): the last two steps are then in flight as
ordinary batches, and ordinary stepping goes on.

The ledger is told of the steps between as one span with `repeat`.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Sequence

import numpy as np

from evener.brain import Brain
from evener.cost.base import BatchShape, DecodeRun
from evener.engine import steady
from evener.engine.batch import BatchResult
from evener.execute.sim.pipeline import ALL, Flight, Pipeline, SpanLedger, make_span, tell
from evener.ledger.spans import MakeUp, Span
from evener.units import Nanoseconds

LEAST = 4
"""Steps; for fewer, a run costs more than it saves."""
MOST = 128
"""Steps of one run; many are cut short by an arrival, and their times are worked out for nothing."""


class _Run:
    """Steps 0 .. n - 1 that will be issued to one replica, of which the brain has issued the first `at`."""

    __slots__ = ("at", "busy", "context", "ends", "epoch", "host_ns", "rows", "shards", "steps")

    def __init__(self, times: DecodeRun, pipeline: Pipeline, rows: int, context: int) -> None:
        first, second = pipeline.in_flight
        host_ns = pipeline.host_ns
        self.host_ns = host_ns
        self.rows, self.context = rows, context
        self.epoch = second.result.epoch
        self.at = 0
        self.shards = times.shards
        self.busy = times.busy
        self.steps = len(times.busy)
        own = times.busy + times.host
        own[0] += max(second.end, first.done + host_ns)
        # Times do not fall as the context grows, so the first step is the shortest.
        if times.host + int(times.busy[0]) >= 2 * host_ns:
            # A step takes longer than its successor needs to be handed over: each begins when the one before ends.
            ends: list[int] = own.cumsum().tolist()
        else:
            ends = _one_by_one(own.tolist(), second.end, 2 * host_ns)
        self.ends = [first.end, second.end, *ends]
        """Of the two batches in flight, then of the steps. Step k is issued with the result of batch k here."""

    def done(self, k: int) -> int:
        """When step k is issued: with the result of the batch two before it."""
        return self.ends[k] + self.host_ns

    def parts(self, cuts: list[int]) -> list[list[list[int]]]:
        """Between cuts, by rank: compute, contended, straggler and transfer of steps [cuts[k], cuts[k + 1]) summed."""
        sums = np.add.reduceat(self.shards[:, :, : cuts[-1]], cuts[:-1], axis=2)
        out: list[list[list[int]]] = sums.transpose(2, 0, 1).tolist()
        return out


def _one_by_one(own: Sequence[int], before: int, handing: int) -> list[int]:
    """Ends of steps that begin when the one before ended and that two before was `handing` ago."""
    ends = [own[0]]  # the first has its start in it already
    for time in own[1:]:
        start = max(ends[-1], before + handing)
        before = ends[-1]
        ends.append(start + time)
    return ends


class Runs:
    """The runs of all replicas: at most one each."""

    def __init__(
        self, brain: Brain, pipelines: list[Pipeline], ledger: SpanLedger | None, never: Collection[int] = ()
    ) -> None:
        """`never`: replicas whose times may change at any moment."""
        self._brain = brain
        self._pipelines = pipelines
        self._ledger = ledger
        self._never = never
        self._runs: list[_Run | None] = [None] * len(pipelines)

    def running(self, index: int) -> bool:
        """A run is going on at this replica."""
        return self._runs[index] is not None

    def ends(self, index: int) -> int | None:
        """When the first result of a run that is not skipped comes; None without a run."""
        run = self._runs[index]
        return None if run is None else run.done(run.steps)

    def start(self, index: int) -> bool:
        """Begin a run if the replica is in for one."""
        pipeline = self._pipelines[index]
        flights = pipeline.in_flight
        if len(flights) != 2 or not (flights[0].plain and flights[1].plain):
            return False
        if len(pipeline.free) != 1 or index in self._never:
            return False
        engine = self._brain.replicas[index]
        steps = steady.steady_steps(engine, MOST)
        if steps < LEAST:
            return False
        group = engine.groups[0]
        known = pipeline.rows.groups[group.group_id]
        if known.ends:
            # The step that ends a row may be issued, and one more: only its result must be seen.
            steps = min(steps, known.ends[0][0] - known.steps + 2)
            if steps < LEAST:
                return False
        times = pipeline.costs.decode_run(index, 0, len(group.rows), group.context, steps)
        self._runs[index] = _Run(times, pipeline, len(group.rows), group.context)
        return True

    def stop(self, index: int) -> None:
        """The replica goes on step by step from where it is."""
        run = self._runs[index]
        if run is not None:
            self._runs[index] = None
            if run.at:
                self._land(index, run)

    def finish(self, index: int) -> int:
        """The end of a run has come, if there is one: catch up with all of it. How many results were skipped."""
        run = self._runs[index]
        if run is None:
            return 0
        left = run.steps - run.at
        if left:
            self._go(index, run, left)
        self.stop(index)
        return left

    def catch_up(self, index: int, at: int, is_result: bool, number: int) -> int:
        """Consume the results that come before an event at `at`: before all else, or the result of replica `number`.

        The engine's batches in flight and the ledger are brought up to date by `stop` only.
        """
        run = self._runs[index]
        assert run is not None
        cut = bisect_right if is_result and index < number else bisect_left
        count = cut(run.ends, at - run.host_ns, run.at, run.steps) - run.at
        if count:
            self._go(index, run, count)
        return count

    def _go(self, index: int, run: _Run, count: int) -> None:
        """The brain sees `count` results and issues as many steps."""
        engine = self._brain.replicas[index]
        steady.skip(engine, count)
        run.at += count

    def _land(self, index: int, run: _Run) -> None:
        """What `run.at` results and issues leave behind: the ledger told, and the last two steps in flight."""
        pipeline = self._pipelines[index]
        engine = self._brain.replicas[index]
        flights = pipeline.in_flight
        ahead = steady.land(engine)
        first_id = ahead + 2 - run.at
        group = pipeline.rows.groups[engine.groups[0].group_id]
        last = max(0, run.at - 2)
        spans_of: list[list[Span]] = []
        if self._ledger is not None:
            cuts = [0, *range(last, run.at + 1)] if last else list(range(run.at + 1))
            spans_of = self._spans(index, run, cuts, first_id)
            between = spans_of.pop(0) if last else []
            self._tell(self._ledger, index, run, flights[0], flights[1], between, first_id)
        group.steps += last
        for step in range(last, run.at):
            spans = spans_of[step - last] if spans_of else []
            ended: list[tuple[int, int]] = []
            pipeline.rows.step(group, ended)
            result = BatchResult(first_id + step, run.epoch, None, ended)
            end = run.ends[step + 2]
            flights.popleft()
            flights.append(Flight(end, end + run.host_ns, result, not ended, spans))
        group.ready = pipeline.free[0] = run.ends[run.at + 1]

    def _tell(
        self, ledger: SpanLedger, index: int, run: _Run, one: Flight, two: Flight, spans: list[Span], first_id: int
    ) -> None:
        """Issues, spans and results of the steps 0 .. at - 1, in the order in which stepping tells them."""
        count = run.at

        between = count - 2
        tell(ledger, one.spans)
        ledger.done(index, one.result.batch_id, Nanoseconds(one.done), 0)
        self._issued(ledger, index, run, 0, first_id, max(1, between))
        if count == 1:
            return
        tell(ledger, two.spans)
        ledger.done(index, two.result.batch_id, Nanoseconds(two.done), 0)
        if between:
            tell(ledger, spans)
            self._issued(ledger, index, run, between, first_id)
            ledger.done(index, first_id, Nanoseconds(run.done(count - 1)), 0)
        self._issued(ledger, index, run, count - 1, first_id)

    def _issued(self, ledger: SpanLedger, index: int, run: _Run, step: int, first_id: int, repeat: int = 1) -> None:
        rows = run.rows
        # The context in the middle of the steps, for what the ledger counts by shape.
        keys = run.context + rows * step + rows * (repeat - 1) // 2
        made_of = MakeUp(BatchShape(0, 0, rows, keys, rows))
        ledger.issued(index, first_id + step, Nanoseconds(run.done(step)), made_of)

    def _spans(self, index: int, run: _Run, cuts: list[int], first_id: int) -> list[list[Span]]:
        """What each shard of the stage does between these steps."""
        out = []
        for first, after, parts in zip(cuts[:-1], cuts[1:], run.parts(cuts), strict=True):
            began, ended = run.ends[first + 2] - int(run.busy[first]), run.ends[after + 1]
            spans = []
            alike = parts.count(parts[0]) == len(parts) > 1
            for rank, (compute, contended, straggler, transfer) in enumerate(parts[:1] if alike else parts):
                host = ended - began - compute - contended - straggler - transfer
                spans.append(
                    make_span(
                        index, 0, ALL if alike else rank, run.epoch, first_id + first, began, ended, compute, compute,
                        contended, straggler, transfer, 0, 0, after - first, host,
                    )
                )  # fmt: skip
            out.append(spans)
        return out
