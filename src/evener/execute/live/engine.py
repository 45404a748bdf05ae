"""The live body: obeys the brain with real workers, and tells it what happened. It holds no policy.

One asyncio loop: events go into `Brain.step` in the order they are seen, commands are carried out at once.
"""

import asyncio
import time
import traceback
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from evener.brain import Brain, BrainConfig
from evener.cost.base import CostModel
from evener.engine.events import (
    Answer,
    Arrived,
    BatchDone,
    Cancelled,
    Event,
    Hold,
    IssueBatch,
    Refuse,
    SetTimer,
    Shutdown,
    TimerFired,
    WorkerDown,
)
from evener.engine.request import Request
from evener.errors import (
    ContextTooLong,
    EvenerError,
    Overloaded,
    StartFailed,
    Unavailable,
    WorkerLost,
)
from evener.execute.base import ReplicaStatus, Status
from evener.execute.live.chronicle import Chronicle
from evener.execute.live.fleet import LiveConfig, make_segments, worker_configs
from evener.execute.live.launch import SocketDir, WorkerProcess
from evener.execute.live.transport.segment import Segment
from evener.execute.live.watch import FailureWatch
from evener.execute.live.wire import Done, Lost, Ready, Spans, Stop, Work, decode_from_worker, encode
from evener.execute.served import ServedLog
from evener.ledger.ledger import Ledger
from evener.ledger.work import Work as PlanWork
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import Nanoseconds, seconds


class LiveEngine:
    """`Engine` over worker processes. Make one with `LiveEngine.start`."""

    def __init__(
        self,
        model: ModelSpec,
        plan: Plan,
        cluster: Cluster,
        kv_blocks: list[int],
        costs: CostModel,
        brain_config: BrainConfig,
        config: LiveConfig,
        work: PlanWork | None = None,
        costs_made_of: dict[str, Any] | None = None,
    ) -> None:
        """`work`: sets the ledger's compute beside the peak. `costs_made_of`: goes into recordings."""
        self.model = model
        self.plan = plan
        self.max_model_len = config.max_model_len
        self.max_top_logprobs = config.max_top_logprobs
        self.cluster = cluster
        self.config = config
        self.brain_config = brain_config
        self.chronicle = Chronicle(config, plan, costs, work)
        self.brain = Brain(plan, kv_blocks, costs, brain_config, self.chronicle.feed)
        self.ready: dict[str, Ready] = {}
        self._kv_blocks = kv_blocks
        self._workers: dict[str, WorkerProcess] = {}
        self._segments: list[Segment | None] = []
        self._watch: FailureWatch | None = None
        self._sockets: SocketDir | None = None
        self._streams: dict[str, asyncio.Queue[Answer | EvenerError]] = {}
        self._timers: dict[int, asyncio.TimerHandle] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._loaded = asyncio.Event()
        self._failed: StartFailed | None = None
        self._closed = False
        self._broken = ""
        """Why nothing can be served any more, after a failure of our own."""
        self._costs_made_of = costs_made_of or {}

    # ---- start and stop ---------------------------------------------------------------------------------------

    @classmethod
    async def start(cls, *args: Any, progress: Callable[[str], None] | None = None, **kwargs: Any) -> "LiveEngine":
        """Start all workers and wait until each has loaded. Raises StartFailed; then nothing is left running."""
        engine = cls(*args, **kwargs)
        try:
            await engine._start(progress)
        except BaseException:
            await engine.close()
            raise
        return engine

    async def _start(self, progress: Callable[[str], None] | None) -> None:
        self._sockets = SocketDir()
        self._context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.bind(self._sockets.endpoint)
        self.chronicle.begin(self.model, self.cluster, self._kv_blocks, self.brain_config, self._costs_made_of)
        tokens = self.brain_config.max_num_batched_tokens + self.brain_config.max_num_seqs
        self._segments = make_segments(self.plan, self.cluster, self.model.hidden, tokens)
        watch = FailureWatch(
            self.plan, self._workers, self._segments, self.config.wait_deadline,
            lambda replica: len(self.brain.replicas[replica].in_flight),
            lambda device, reason: self._consume(WorkerDown(device, reason)),
        )  # fmt: skip
        self._watch = watch
        for config in worker_configs(
            self.model, self.plan, self.cluster, self._kv_blocks, self.brain_config, self.config, self._segments,
            self._sockets.endpoint,
        ):  # fmt: skip
            worker = WorkerProcess(config)
            self._workers[worker.name] = worker
            watching = asyncio.create_task(self._until_it_ends(worker), name=f"watch {worker.name}")
            self._tasks.append(watching)
        receiving = asyncio.create_task(self._receive(watch, progress), name="receive")
        receiving.add_done_callback(self._receive_ended)
        self._tasks.append(receiving)
        try:
            await asyncio.wait_for(self._loaded.wait(), self.config.start_timeout)
        except TimeoutError:
            missing = ", ".join(sorted(set(self._workers) - set(self.ready)))
            raise StartFailed(
                f"worker {missing} not ready after {self.config.start_timeout:.0f} s; raise --start-timeout, "
                "or look for what keeps it (memory, a slow disk)"
            ) from None
        if self._failed is not None:
            raise self._failed
        self._tasks.append(asyncio.create_task(watch.hung(), name="watch progress"))

    async def close(self) -> None:
        """Fail what is unfinished, stop the workers, free everything; idempotent."""
        if self._closed:
            return
        self._closed = True
        self._consume(Shutdown("the server is shutting down"))
        for timer in self._timers.values():
            timer.cancel()
        for name in self.ready:
            if self._workers[name].process.poll() is None:
                self._send(name, encode(Stop()))
        deadline = time.monotonic() + 5.0
        while any(w.process.poll() is None for n, w in self._workers.items() if n in self.ready):
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(0.02)
        for worker in self._workers.values():
            worker.kill()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for worker in self._workers.values():
            worker.close()
        for segment in self._segments:
            if segment is not None:
                segment.close()
        if self._sockets is not None:
            self._socket.close()
            self._context.term()
            self._sockets.close()
        self.chronicle.close()

    # ---- Engine -----------------------------------------------------------------------------------------------

    async def submit(self, request: Request) -> AsyncIterator[Answer]:
        """See Engine."""
        if request.request_id in self._streams:
            raise ValueError(f"request id {request.request_id!r} is in use")
        if self._broken or self._closed:
            raise Unavailable(self._broken or "the server is shutting down")
        queue: asyncio.Queue[Answer | EvenerError] = asyncio.Queue()
        self._streams[request.request_id] = queue
        try:
            self._consume(Arrived(request))
            while True:
                answer = await queue.get()
                if isinstance(answer, EvenerError):
                    raise answer
                yield answer
                if answer.finish is not None:
                    return
        finally:
            # Closed early: the client left.
            if self._streams.pop(request.request_id, None) is not None and not self._closed:
                self._consume(Cancelled(request.request_id))

    def cancel(self, request_id: str, stopped: bool = False) -> None:
        """See Engine."""
        self._consume(Cancelled(request_id, stopped))

    def status(self) -> Status:
        """See Engine."""
        replicas = []
        for replica, part in zip(self.brain.replicas, self.plan.replicas, strict=True):
            down = self.brain.down.get(replica.index)
            replicas.append(
                ReplicaStatus(
                    replica=replica.index,
                    devices=part.devices(),
                    alive=down is None,
                    reason=down or "",
                    running=replica.running_rows(),
                    waiting=replica.waiting_rows(),
                    in_flight=len(replica.in_flight),
                    kv_blocks=replica.pool.n_blocks,
                    kv_blocks_free=replica.pool.available,
                    preemptions=replica.preemptions,
                    prefix_hit_tokens=replica.prefix_hit_tokens,
                    prompt_tokens=replica.prompt_tokens,
                    output_tokens=replica.output_tokens,
                )
            )
        ready = not self._closed and not self._broken and len(self.brain.down) < len(self.brain.replicas)
        reason = ""
        if self._broken:
            reason = self._broken
        elif self._closed:
            reason = "the server is shutting down"
        elif not ready:
            reason = self.brain.no_replica_reason()
        return Status(ready, tuple(replicas), reason, self.chronicle.warnings())

    def ledger(self) -> Ledger:
        """See Engine."""
        return self.chronicle.ledger()

    def served(self) -> ServedLog:
        """See Engine."""
        assert self.chronicle.served is not None, "the engine has started"
        return self.chronicle.served

    # ---- events in, commands out ------------------------------------------------------------------------------

    def _consume(self, event: Event) -> None:
        now = Nanoseconds(time.monotonic_ns())
        commands = self.brain.step(event, now)
        self.chronicle.step(now, event, commands)
        for command in commands:
            if isinstance(command, Answer):
                queue = self._streams.get(command.request_id)
                if queue is not None:
                    queue.put_nowait(command)
                    if command.finish is not None:
                        del self._streams[command.request_id]
            elif isinstance(command, IssueBatch):
                self._issue(command)
            elif isinstance(command, Refuse):
                queue = self._streams.pop(command.request_id, None)
                if queue is not None:
                    queue.put_nowait(_as_error(command))
            elif isinstance(command, SetTimer):
                delay = max(0.0, seconds(command.at - now))
                timer = command.timer_id
                self._timers[timer] = asyncio.get_running_loop().call_later(delay, self._fire, timer)
            else:
                assert isinstance(command, Hold)  # the ledger's business; nothing to carry out

    def _fire(self, timer_id: int) -> None:
        self._timers.pop(timer_id, None)
        if not self._closed:
            self._consume(TimerFired(timer_id))

    def _issue(self, command: IssueBatch) -> None:
        in_flight = self.brain.replicas[command.replica].in_flight
        if in_flight and in_flight[0].batch_id == command.batch.batch_id:  # it was idle: its time starts now
            assert self._watch is not None
            self._watch.gets_on(command.replica)
        data = encode(Work(command.batch))
        for device in self.plan.replicas[command.replica].devices():
            self._send(device, data)

    def _send(self, device: str, data: bytes) -> None:
        # No high-water mark is set, so this queues at once. A process that is gone is the watcher's business: it knows
        # how it ended.
        sent: Any = self._socket.send_multipart([device.encode(), data], flags=zmq.NOBLOCK)
        sent.add_done_callback(lambda future: future.cancelled() or future.exception())

    async def _receive(self, watch: FailureWatch, progress: Callable[[str], None] | None) -> None:
        while True:
            _, data = await self._socket.recv_multipart()
            try:
                message = decode_from_worker(data)
            except msgspec.DecodeError as error:
                raise AssertionError(f"a worker sent what is no message: {error}") from error
            if isinstance(message, Done):
                watch.gets_on(message.replica)
                self._consume(BatchDone(message.replica, message.result))
            elif isinstance(message, Spans):
                self.chronicle.spans(message)
            elif isinstance(message, Ready):
                self.ready[message.device] = message
                self.chronicle.ready(message.device)
                if progress is not None:
                    progress(f"{message.device} ready in {message.load_s:.1f} s, weights {message.weights_from}")
                if len(self.ready) == len(self._workers):
                    self._loaded.set()
            elif isinstance(message, Lost):
                self._lost(message.lost, message.reason)

    def _receive_ended(self, task: "asyncio.Task[None]") -> None:
        """Without this task no result would ever arrive: fail everything rather than hang."""
        if task.cancelled() or self._closed:
            return
        error = task.exception()
        traceback.print_exception(error)
        self._broken = f"the engine failed ({type(error).__name__}: {error}); restart the server"
        for queue in self._streams.values():
            queue.put_nowait(Unavailable(self._broken))
        self._streams.clear()
        for worker in self._workers.values():
            worker.kill()

    # ---- failures ---------------------------------------------------------------------------------------------

    async def _until_it_ends(self, worker: WorkerProcess) -> None:
        try:
            how = await worker.wait()
        except Exception as error:  # a worker that nobody watches must not serve
            how = f"it cannot be watched ({type(error).__name__}: {error})"
        if not self._closed:
            self._lost(worker.name, how)

    def _lost(self, device: str, reason: str) -> None:
        if not self._loaded.is_set():
            self._failed = StartFailed(f"worker {device} did not start: {reason}")
            self._loaded.set()
        elif not self._closed and not self._broken:
            assert self._watch is not None
            self._watch.lost(device, reason)


def _as_error(refusal: Refuse) -> EvenerError:
    if refusal.code == "overloaded":
        return Overloaded(refusal.message, refusal.retry_after_s)
    if refusal.code == "context_length_exceeded":
        return ContextTooLong(refusal.message, "max_tokens")
    if refusal.code == "worker_lost":
        lost = WorkerLost("", "")
        lost.args = (refusal.message,)
        lost.message = refusal.message
        return lost
    return Unavailable(refusal.message)
