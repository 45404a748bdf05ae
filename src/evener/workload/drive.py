"""When each request is sent: open loop at given times, or closed loop at constant concurrency.

The loops know nothing of HTTP or engines; they call a `Send` and keep one `Record` per request. Records exist from
the start and begin as failed (`unfinished`), so that every request ends as completed or failed, whatever happens.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence

from msgspec import Struct, field

from evener.errors import InvalidInput
from evener.workload.requests import TimedRequest

Clock = Callable[[], float]
"""Seconds since the start of the run."""


class SendFailed(Exception):
    """A request that did not complete. `reason` is a short name to count by, `detail` what the other side said."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail[:500]


class Record(Struct):
    """What happened to one request. All times are seconds from the start of the run."""

    index: int
    asked_tokens: int
    """Output tokens asked for."""
    scheduled_s: float
    """Open loop: when it should have been sent. Closed loop: when its turn came."""
    sent_s: float | None = None
    """None: it never was."""
    ended_s: float = 0.0
    chunk_s: list[float] = field(default_factory=list)
    """Arrival times of the pieces of the answer; a piece is one token unless the server joins several."""
    input_tokens: int = 0
    """As counted by the server."""
    output_tokens: int = 0
    """As counted by the server."""
    failure: str | None = "unfinished"
    """None: completed."""
    detail: str = ""


Send = Callable[[TimedRequest, Record, Clock], Awaitable[None]]
"""Sends one request and fills `chunk_s`, `input_tokens`, `output_tokens`; raises SendFailed if it did not complete."""


class Run(Struct):
    """The records of one run."""

    records: list[Record]
    open_loop: bool
    duration_s: float = 0.0
    """From the start of the run to the end of its last request."""
    client_cpu_s: float = 0.0
    """CPU time of this process meanwhile, user and system."""


OnDone = Callable[[Record], None]


def _ignore(record: Record) -> None:
    """No progress wanted."""


async def open_loop(requests: Sequence[TimedRequest], send: Send, run: Run, on_done: OnDone = _ignore) -> None:
    """Send each request at its `arrival_s`, whether or not earlier ones are done.

    Fills `run` (from `new_run`), also when it is cancelled: requests that had not ended stay `unfinished`.
    """
    async with _Timed(run) as now, asyncio.TaskGroup() as group:
        for request, record in zip(requests, run.records, strict=True):
            delay = request.arrival_s - now()
            if delay > 0:
                await asyncio.sleep(delay)
            group.create_task(_one(request, record, send, now, on_done))


async def closed_loop(
    requests: Sequence[TimedRequest], concurrency: int, send: Send, run: Run, on_done: OnDone = _ignore
) -> None:
    """Keep `concurrency` requests outstanding until all are done. Fills `run` as `open_loop` does.

    Raises InvalidInput for a concurrency below 1.
    """
    if concurrency < 1:
        raise InvalidInput(f"concurrency {concurrency} sends nothing; it must be at least 1")
    queue = iter(zip(requests, run.records, strict=True))
    async with _Timed(run) as now:

        async def work() -> None:
            for request, record in queue:
                record.scheduled_s = now()
                await _one(request, record, send, now, on_done)

        async with asyncio.TaskGroup() as group:
            for _ in range(min(concurrency, len(requests))):
                group.create_task(work())


def new_run(requests: Sequence[TimedRequest], open_loop: bool) -> Run:
    """A run that has not begun: every record is `unfinished`."""
    return Run([Record(r.index, r.output_tokens, r.arrival_s) for r in requests], open_loop)


async def _one(request: TimedRequest, record: Record, send: Send, now: Clock, on_done: OnDone) -> None:
    record.sent_s = now()
    try:
        await send(request, record, now)
        record.failure = None
    except SendFailed as failed:
        record.failure, record.detail = failed.reason, failed.detail
    except Exception as error:  # a fault of the client itself must not end the run, nor pass unseen
        record.failure, record.detail = "client_error", f"{type(error).__name__}: {error}"[:500]
    record.ended_s = now()
    on_done(record)


class _Timed:
    """Starts the clock of a run and, on the way out, writes its duration and CPU time."""

    def __init__(self, run: Run) -> None:
        self._run = run

    async def __aenter__(self) -> Clock:
        self._start, self._cpu = time.perf_counter(), time.process_time()
        start = self._start
        return lambda: time.perf_counter() - start

    async def __aexit__(self, *exc: object) -> None:
        self._run.duration_s = time.perf_counter() - self._start
        self._run.client_cpu_s = time.process_time() - self._cpu
