"""What a worker makes of its stamps, with clocks and kernel counters that a test can set."""

import os
import threading
import time
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from evener.execute.live import spans as module
from evener.execute.live.inbox import Inbox
from evener.execute.live.kernel_time import Helpers, KernelTime
from evener.execute.live.spans import SpanMaker
from evener.execute.live.transport.base import Stamp
from evener.execute.live.transport.pace import Pace
from evener.execute.live.wire import Stop, encode
from evener.ledger.spans import Op, Span
from evener.units import Nanoseconds as Ns

MS = 1_000_000


class Clock:
    """Stands in for the module `time`: wall and CPU time are what the test says."""

    def __init__(self) -> None:
        self.wall = self.cpu = 1_000 * MS

    def monotonic_ns(self) -> int:
        return self.wall

    def thread_time_ns(self) -> int:
        return self.cpu

    def run(self, wall: int, cpu: int | None = None) -> None:
        """So much wall time passes, and so much CPU time of it (all)."""
        self.wall += wall
        self.cpu += wall if cpu is None else cpu


class Kernel:
    """Counters as the test sets them."""

    def __init__(self) -> None:
        self.delayed = self.stolen = 0
        self.others = Helpers(Ns(0), ())

    def delay(self) -> int:
        return self.delayed

    def helpers(self) -> Helpers:
        return self.others

    def take_stolen(self, most: int) -> int:
        taken = min(most, self.stolen)
        self.stolen -= taken
        return taken

    def forget_stolen(self) -> None:
        self.stolen = 0

    def look_for_helpers(self) -> None:
        pass


class Payer:
    """Stands in for a Pace: what a declared slow-down has slept, and used for it, is what the test says."""

    def __init__(self) -> None:
        self.slept_ns = self.spent_ns = self.waited_ns = 0

    def idled(self, now: int, cpu: int) -> None:
        """Nothing depends on it here."""


class World:
    """A worker's clocks, and its span maker."""

    def __init__(self, threads: int = 1, segments: bool = False) -> None:
        self.clock, self.kernel, self.pace = Clock(), Kernel(), Payer()
        module.time = self.clock  # type: ignore[assignment]
        self.maker = SpanMaker(0, 1, 2, 3, self.pace, self.kernel, threads, segments)  # type: ignore[arg-type]

    def operate(self, op: Op, waited: int, moved: int, cpu: int, nbytes: int = 100) -> None:
        """An operation: waits, then moves, using so much CPU."""
        c = self.clock
        entered, cpu_in = c.wall, c.cpu
        c.run(waited + moved, cpu)
        stamp = Stamp(Ns(entered), Ns(entered + waited), Ns(c.wall), Ns(cpu_in), Ns(c.cpu))
        self.maker.log.append((int(op), nbytes, stamp))

    def span(self, batch: int = 7) -> Span:
        self.maker.finished(batch)
        [made] = self.maker.take()
        return made


@pytest.fixture(autouse=True)
def real_time() -> Iterator[None]:
    """Puts the clock back."""
    kept = module.time
    yield
    module.time = kept


def test_compute_is_what_lies_between_operations() -> None:
    w = World()
    w.clock.run(5 * MS)
    w.operate(Op.ALL_REDUCE, 2 * MS, MS, cpu=3 * MS)
    w.clock.run(4 * MS)
    w.operate(Op.RECV, 3 * MS, MS, cpu=MS)
    w.operate(Op.SEND, MS, 2 * MS, cpu=2 * MS)
    w.clock.run(MS)
    span = w.span()
    assert (span.replica, span.stage, span.rank, span.epoch, span.batch_id) == (0, 1, 2, 3, 7)
    assert span.ended - span.began == 20 * MS
    assert (span.compute, span.cpu) == (10 * MS, 10 * MS)
    assert (span.straggler, span.bubble, span.transfer, span.contended) == (2 * MS, 4 * MS, 4 * MS, 0)
    assert {t.op: (t.count, t.nbytes, t.waited, t.moving) for t in span.traffic} == {
        Op.ALL_REDUCE: (1, 100, 2 * MS, MS), Op.RECV: (1, 100, 3 * MS, MS), Op.SEND: (1, 100, MS, 2 * MS),
    }  # fmt: skip


def test_losing_the_core_is_contended_as_far_as_the_kernel_says_so() -> None:
    w = World()
    w.clock.run(10 * MS, cpu=4 * MS)
    w.kernel.delayed += 3 * MS
    w.kernel.stolen = 2 * MS
    span = w.span()
    assert span.compute == span.cpu == 4 * MS
    assert span.contended == 5 * MS, "3 in the run queue, 2 stolen; the last one nobody explains"


def test_a_late_wake_is_contended_and_no_transfer() -> None:
    w = World()
    w.operate(Op.ALL_REDUCE, 5 * MS, 4 * MS, cpu=MS)
    w.kernel.delayed += 3 * MS
    span = w.span()
    assert (span.straggler, span.contended, span.transfer) == (5 * MS, 3 * MS, MS)
    w.operate(Op.ALL_REDUCE, 5 * MS, 4 * MS, cpu=9 * MS)
    w.kernel.delayed += 3 * MS
    assert w.span().contended == 0, "it spun all the time: the wait lay elsewhere"


def test_a_declared_sleep_is_the_devices_own_work() -> None:
    w = World()
    w.clock.run(4 * MS)
    w.clock.run(4 * MS, cpu=MS)
    w.pace.slept_ns += 4 * MS
    w.pace.spent_ns += MS
    span = w.span()
    assert (span.cpu, span.contended) == (4 * MS, 0)
    assert span.compute == 8 * MS, "what sleeping took of the processor is no work of the device"
    assert w.maker.wait_cpu == MS


def test_idle_time_belongs_to_no_span() -> None:
    w = World()
    w.clock.run(MS)
    first = w.span(1)
    w.clock.run(9 * MS, cpu=2 * MS)
    w.kernel.delayed += MS
    w.maker.woken()
    w.clock.run(MS)
    second = w.span(2)
    assert second.began - first.ended == 9 * MS
    assert (second.idle_contended, second.contended, second.compute) == (MS, 0, MS)
    assert w.maker.idle_cpu == 2 * MS
    third = w.span(3)
    assert third.began == second.ended, "without an idle wait it begins where the last one ended"


def test_several_threads_wait_for_each_other() -> None:
    w = World(threads=4)
    w.clock.run(10 * MS, cpu=6 * MS)
    w.kernel.others = Helpers(Ns(20 * MS), (MS, 0, 2 * MS))
    span = w.span()
    assert span.contended == 2 * MS, "what the slowest helper lost"
    assert (span.compute, span.cpu) == (8 * MS, 26 * MS)


steps = st.lists(
    st.tuples(
        st.sampled_from([None, Op.ALL_REDUCE, Op.ALL_GATHER, Op.RECV, Op.TOKENS, Op.SEND]),
        st.integers(0, 10 * MS), st.integers(0, 10 * MS), st.floats(0, 1), st.integers(0, 5 * MS),
    ),
    max_size=30,
)  # fmt: skip


@given(steps, st.integers(1, 3), st.integers(0, 20 * MS))
def test_law_2_the_parts_of_a_span_fit_into_it(
    steps: list[tuple[Op | None, int, int, float, int]], threads: int, stolen: int
) -> None:
    """Whatever the clocks say: no part is negative, all together are no more than the span, segments tile it."""
    w = World(threads=threads, segments=True)
    w.kernel.stolen = stolen
    for op, a, b, part, delayed in steps:
        if op is None:
            w.clock.run(a + b, int((a + b) * part))
        else:
            w.operate(op, a, b, int((a + b) * part))
        w.kernel.delayed += delayed
    span = w.span()
    parts = (span.compute, span.contended, span.straggler, span.transfer, span.bubble)
    assert min(parts) >= 0
    assert sum(parts) <= span.ended - span.began
    if threads > 1:
        assert sum(parts) == span.ended - span.began
    at = span.began
    for segment in span.segments:
        assert segment.entered == at and segment.entered <= segment.arrived <= segment.ended
        at = segment.ended
    assert at == span.ended


def test_the_kernels_counters_can_be_read() -> None:
    kernel = KernelTime((0,), 2)
    before = kernel.delay()
    assert 0 <= before <= kernel.delay()
    cpu, delays = kernel.helpers()
    assert cpu >= 0 and all(d >= 0 for d in delays)
    assert 0 <= kernel.take_stolen(5) <= 5
    assert kernel.take_stolen(0) == 0


def test_steal_of_an_idle_time_explains_no_later_stall(monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = KernelTime((0,), 1)
    tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
    stolen = kernel._steal() + 5_000_000_000
    monkeypatch.setattr(kernel, "_steal", lambda: stolen)
    kernel.forget_stolen()
    assert kernel.take_stolen(1_000_000_000) <= tick
    stolen += 3_000_000
    assert kernel.take_stolen(1_000_000_000) <= tick + 3_000_000


def test_a_slow_device_owes_for_all_but_its_operations() -> None:
    """Also for the calls around them, so that it takes `slowdown` times its CPU time."""
    pace = Pace(3.0)
    pace.idled(100_000, 0)
    pace.skip(105_000, 5_000, 500_000, 90_000)
    pace.skip(501_000, 91_000, 509_000, 99_000)
    assert (pace.owed_ns, pace.slept_ns) == ((5_000 + 1_000) * 2, 0)


def test_a_slow_device_has_paid_by_waiting_for_its_core() -> None:
    """The device that it stands for would have had a core of its own: only what goes beyond is lost to others."""
    pace = Pace(3.0)
    pace.idled(0, 0)
    pace.skip(9_000, 5_000, 9_000, 5_000)
    assert (pace.owed_ns, pace.slept_ns) == (5_000 * 2 - 4_000, 4_000)
    pace.skip(109_000, 5_000, 109_000, 5_000)
    assert (pace.owed_ns, pace.slept_ns) == (0, 10_000)


def test_a_wait_that_was_paid_is_not_taken_for_a_late_wake_up() -> None:
    """The kernel counts it as waiting for the core; the operations did not lose it."""
    w = World()
    w.clock.run(4 * MS)
    w.clock.run(3 * MS, cpu=0)  # waited for its core: what it would have slept
    w.pace.slept_ns = w.pace.waited_ns = w.kernel.delayed = 3 * MS
    w.operate(Op.ALL_REDUCE, waited=0, moved=2 * MS, cpu=0)  # a link's delay
    span = w.span()
    assert (span.compute, span.contended, span.transfer) == (7 * MS, 0, 2 * MS)


def test_a_slow_device_of_several_threads_does_not_pay_by_waiting_for_its_helpers() -> None:
    pace = Pace(3.0, threads=2)
    pace.idled(0, 0)
    pace.skip(9_000, 5_000, 9_000, 5_000)
    assert (pace.owed_ns, pace.slept_ns, pace.waited_ns) == (5_000 * 2, 0, 0)


def test_waiting_for_work_pays_nothing() -> None:
    """With or without a ledger, a slow device is as slow after an idle stretch as before."""
    context = zmq.Context.instance()
    control, worker = context.socket(zmq.PAIR), context.socket(zmq.PAIR)
    control.bind("inproc://inbox")
    worker.connect("inproc://inbox")
    pace = Pace(3.0)
    inbox = Inbox(worker, "cpu:0", pace, None)
    late = threading.Timer(0.05, lambda: control.send(encode(Stop())))
    late.start()
    assert isinstance(inbox.next(), Stop)
    late.join()
    begin, cpu = time.monotonic_ns(), time.thread_time_ns()
    while time.thread_time_ns() - cpu < 5 * MS:
        pass
    used = time.thread_time_ns() - cpu
    pace.pay()
    assert time.monotonic_ns() - begin >= 3 * used
    control.close()
    worker.close()


@pytest.mark.parametrize("sleeps", [True, False])
def test_a_slow_device_lets_pass_what_it_owes(sleeps: bool) -> None:
    pace = Pace(3.0, sleeps=sleeps)
    begin = time.thread_time_ns()
    pace.idled(time.monotonic_ns(), begin)
    while time.thread_time_ns() - begin < 5 * MS:
        pass
    pace.pay()
    assert pace.owed_ns <= 0, "all of it, or longer"
    assert pace.slept_ns >= 2 * 5 * MS
    idle = pace.owed_ns
    pace.idled(time.monotonic_ns(), time.thread_time_ns())
    assert pace.owed_ns == idle, "time without work owes nothing"


def test_a_device_that_is_not_slow_owes_nothing() -> None:
    pace = Pace(1.0)
    pace.pay()
    assert (pace.owed_ns, pace.slept_ns, pace.spent_ns) == (0, 0, 0)
    for wrong in (0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="finite number from 1 up"):
            Pace(wrong)
