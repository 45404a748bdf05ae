"""A worker's spans: what each batch's time on this device was spent on, from the stamps of its operations.

Between two operations the worker computes; inside one it waits for peers (until the last had arrived) and then moves
data. Every boundary carries the wall clock and the thread's CPU clock. A device of one thread does not block while it
computes, so time off the CPU is a core lost: `contended`, as far as the kernel's run-queue and steal counters say so
(what a declared slow-down would have slept anyway is compute). What they do not explain is left out of the span's
parts, and the ledger shows it as unattributed.
"""

import time

import torch
from msgspec import structs

from evener.execute.live.kernel_time import KernelTime
from evener.execute.live.transport.base import Group, Pipe, RunsLayers, Stamp
from evener.execute.live.transport.pace import Pace
from evener.kernels.layers import Batch, Layers
from evener.ledger.spans import Op, Segment, Span, Traffic
from evener.units import Nanoseconds

_OLD_NS = 50_000_000
"""An idle stretch after which what was stolen meanwhile explains nothing any more."""
_REDUCE, _GATHER, _TO_ALL = int(Op.ALL_REDUCE), int(Op.ALL_GATHER), int(Op.ALL_TO_ALL)


class SpanMaker:
    """Turns stamps into spans, for one worker. Its methods are called by the thread that runs the batches."""

    def __init__(
        self, replica: int, stage: int, rank: int, epoch: int, pace: Pace, kernel: KernelTime, threads: int,
        keep_segments: bool = False,
    ) -> None:  # fmt: skip
        self._place = (replica, stage, rank, epoch)
        self._pace = pace
        self._kernel = kernel
        self._threads = threads
        self._keep_segments = keep_segments
        self.log: list[tuple[int, int, Stamp]] = []
        """(Op, bytes, stamp) of the batch in progress."""
        self._spans: list[Span] = []
        self._unexplained: list[int] = []
        """Per span: off the CPU while it computed, and no run-queue wait to show for it."""
        self.wait_cpu = 0
        """CPU time inside operations so far: spinning and copying, and what a declared slow-down takes to pay."""
        self.idle_cpu = 0
        """CPU time between spans so far: polling and reporting."""
        self._helpers = kernel.helpers()
        self._began = self._cpu = self._delay = self._slept = self._spent = self._waited = self._idle_delay = 0
        self.woken()
        self.idle_cpu = 0

    @property
    def began(self) -> int:
        """Where the next span begins, unless the worker is woken first."""
        return self._began

    def woken(self) -> None:
        """A batch came after the worker had been idle: its span begins now. Otherwise it began with the last's end."""
        if time.monotonic_ns() - self._began > _OLD_NS:
            self._kernel.forget_stolen()
        cpu, self._began = time.thread_time_ns(), time.monotonic_ns()
        delay = self._kernel.delay()
        self.idle_cpu += cpu - self._cpu
        self._idle_delay = delay - self._delay
        self._cpu, self._delay = cpu, delay
        self._see_pace()
        self._pace.idled(self._began, cpu)

    def finished(self, batch_id: int) -> None:
        """The batch is done here, its results are sent."""
        cpu, ended = time.thread_time_ns(), time.monotonic_ns()
        delay = self._kernel.delay()
        late = wait_cpu = 0
        kinds: list[list[int]] = [[0, 0, 0, 0] for _ in Op]
        for op, nbytes, (entered, arrived, done, cpu_in, cpu_out) in self.log:
            moved = done - arrived
            used = cpu_out - cpu_in
            wait_cpu += used
            if moved > used:  # off the CPU for longer than there was to wait for: it lost time after all had arrived
                late += moved - used
            kind = kinds[op]
            kind[0] += 1
            kind[1] += nbytes
            kind[2] += arrived - entered
            kind[3] += moved
        straggler = sum(kind[2] for kind in kinds[: _TO_ALL + 1])
        bubble = sum(kind[2] for kind in kinds[_TO_ALL + 1 :])
        moving = sum(kind[3] for kind in kinds)
        own_wall = ended - self._began - straggler - bubble - moving
        wait_cpu += self._pace.spent_ns - self._spent
        own_cpu = cpu - self._cpu - wait_cpu
        self.wait_cpu += wait_cpu
        slept = self._pace.slept_ns - self._slept
        off = max(0, own_wall - own_cpu - slept)
        delayed = delay - self._delay
        others_cpu, others_delay = self._read_helpers() if self._threads > 1 else (0, 0)
        contended = min(off, delayed + others_delay)
        unexplained = off - contended
        # What is left of the thread's wait in the run queue fell into its operations: it was woken late.
        paid = self._pace.waited_ns - self._waited
        woken_late = min(late, max(0, delayed - contended - paid))
        compute = own_wall - off
        if self._threads > 1:
            # Waiting for its own helpers is the device's own work; only what the kernel saw lost is not.
            compute, unexplained = own_wall - contended, 0
        self._spans.append(
            Span(
                *self._place,
                batch_id,
                began=Nanoseconds(self._began),
                ended=Nanoseconds(ended),
                compute=Nanoseconds(compute),
                cpu=Nanoseconds(own_cpu + others_cpu),
                contended=Nanoseconds(contended + woken_late),
                straggler=Nanoseconds(straggler),
                transfer=Nanoseconds(moving - woken_late),
                bubble=Nanoseconds(bubble),
                idle_contended=Nanoseconds(self._idle_delay),
                traffic=tuple(
                    Traffic(op, count, nbytes, Nanoseconds(waited), Nanoseconds(moved))
                    for op, (count, nbytes, waited, moved) in enumerate(kinds)
                    if count
                ),
                segments=self._segments(ended, cpu) if self._keep_segments else (),
            )
        )
        self._unexplained.append(unexplained)
        self.log.clear()
        self._began, self._cpu, self._delay, self._idle_delay = ended, cpu, delay, 0
        self._see_pace()

    def _see_pace(self) -> None:
        pace = self._pace
        self._slept, self._spent, self._waited = pace.slept_ns, pace.spent_ns, pace.waited_ns

    def take(self) -> tuple[Span, ...]:
        """The spans since the last call, in order."""
        for k, unexplained in enumerate(self._unexplained):
            if unexplained and (stolen := self._kernel.take_stolen(unexplained)):
                span = self._spans[k]
                self._spans[k] = structs.replace(span, contended=Nanoseconds(span.contended + stolen))
        self._kernel.forget_stolen()
        taken = tuple(self._spans)
        self._spans.clear()
        self._unexplained.clear()
        self._kernel.look_for_helpers()
        return taken

    def _read_helpers(self) -> tuple[int, int]:
        """Since the last span: CPU time of all helpers, and the run-queue wait of the one that waited most."""
        before, self._helpers = self._helpers, self._kernel.helpers()
        waits = zip(self._helpers.delay, before.delay + (0,) * len(self._helpers.delay), strict=False)
        return self._helpers.cpu - before.cpu, max((now - then for now, then in waits), default=0)

    def _segments(self, ended: int, cpu: int) -> tuple[Segment, ...]:
        """The batch in progress, stretch by stretch."""
        made: list[Segment] = []
        at, at_cpu = self._began, self._cpu
        for op, nbytes, stamp in self.log:
            made.append(_computed(at, stamp.entered, stamp.cpu_entered - at_cpu))
            made.append(Segment(op, stamp.entered, stamp.arrived, stamp.ended, nbytes))
            at, at_cpu = stamp.ended, stamp.cpu_ended
        made.append(_computed(at, ended, cpu - at_cpu))
        return tuple(made)


def _computed(began: int, ended: int, cpu: int) -> Segment:
    return Segment(int(Op.COMPUTE), Nanoseconds(began), Nanoseconds(began), Nanoseconds(ended), cpu)


class TimedGroup:
    """A Group that leaves its stamps with the span maker."""

    def __init__(self, inner: Group, spans: SpanMaker) -> None:
        self._inner = inner
        self._note = spans.log.append
        self.rank = inner.rank
        self.size = inner.size
        if isinstance(inner, RunsLayers):
            self._layers = inner
            self.run_layers = self._run_layers

    def _run_layers(self, layers: Layers, batch: Batch, x_TH: torch.Tensor) -> list[Stamp]:
        """See RunsLayers; only there where the inner group has it."""
        stamps = self._layers.run_layers(layers, batch, x_TH)
        nbytes = x_TH.nbytes
        for stamp in stamps:
            self._note((_REDUCE, nbytes, stamp))
        return stamps

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        """See Group."""
        stamp = self._inner.all_reduce(t)
        self._note((_REDUCE, t.nbytes, stamp))
        return stamp

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See Group."""
        stamp = self._inner.all_gather(t, out)
        self._note((_GATHER, t.nbytes, stamp))
        return stamp

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See Group."""
        stamp = self._inner.all_to_all(t, out)
        self._note((_TO_ALL, t.nbytes, stamp))
        return stamp

    def close(self) -> None:
        """See Group."""
        self._inner.close()


class TimedPipe:
    """A Pipe that leaves its stamps with the span maker. `received`: what receiving from it means, RECV or TOKENS."""

    def __init__(self, inner: Pipe, spans: SpanMaker, received: Op) -> None:
        self._inner = inner
        self._note = spans.log.append
        self._received = int(received)
        self._send = int(Op.SEND)

    def send(self, t: torch.Tensor) -> Stamp:
        """See Pipe."""
        stamp = self._inner.send(t)
        self._note((self._send, t.nbytes, stamp))
        return stamp

    def recv(self, out: torch.Tensor) -> Stamp:
        """See Pipe."""
        stamp = self._inner.recv(out)
        self._note((self._received, out.nbytes, stamp))
        return stamp

    def poll(self) -> bool:
        """See Pipe."""
        return self._inner.poll()

    def close(self) -> None:
        """See Pipe."""
        self._inner.close()
