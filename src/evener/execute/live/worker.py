"""One worker process: one shard on one device. It obeys batches in order and decides nothing.

Started as `python -m evener.execute.live.worker` with its configuration (msgpack of WorkerConfig) on standard input.
"""

import ctypes
import os
import signal
import sys
import time
import traceback
from typing import NamedTuple

import msgspec
import torch
import zmq

from evener import kernels
from evener.errors import EvenerError, WorkerLost
from evener.execute.live.inbox import Inbox
from evener.execute.live.kernel_time import KernelTime
from evener.execute.live.runner import Runner
from evener.execute.live.sampler import Sampler
from evener.execute.live.slots import Slots
from evener.execute.live.spans import SpanMaker, TimedGroup, TimedPipe
from evener.execute.live.topology import layout_of
from evener.execute.live.transport.base import Group, Pipe
from evener.execute.live.transport.pace import Pace
from evener.execute.live.transport.segment import Segment
from evener.execute.live.transport.shm import SPIN
from evener.execute.live.wire import Done, Lost, Ready, Stop, WorkerConfig, encode
from evener.execute.live.wiring import connect
from evener.ledger.spans import Op
from evener.model.decoder import TORCH_DTYPE, StageModel
from evener.model.source import open_model
from evener.spec.memory import weight_bytes
from evener.units import Nanoseconds, Seconds


def _die_with_parent() -> None:
    """Ask the kernel to kill this process when the control process ends, however it ends (Linux prctl)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _give_back_memory() -> None:
    """Return what loading took and freed to the system (glibc keeps it otherwise: as much as the weights again)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


class Loaded(NamedTuple):
    """A worker that can run batches."""

    runner: Runner
    ready: Ready
    spans: SpanMaker | None
    """None: nobody wants to know where the time goes."""


def load(config: WorkerConfig) -> Loaded:
    """Read this shard's weights, allocate its KV, connect it to its peers. Raises EvenerError."""
    begin = time.monotonic()
    device = config.device
    if device.cores:
        os.sched_setaffinity(0, device.cores)
    threads = max(1, len(device.cores))
    torch.set_num_threads(threads)
    kernels.set_threads(threads)
    replica, stage = config.replica, config.replica.stages[config.stage]
    shard = stage.shards[config.rank]
    first, last = config.stage == 0, config.stage == len(replica.stages) - 1
    model = StageModel(
        open_model(config.model), config.spec, stage, shard, first_stage=first, last_stage=last, rank=config.rank,
        dtype=TORCH_DTYPE[config.dtype], device="cpu", max_position=config.max_model_len,
        keep_packed=True,
    )  # fmt: skip
    _give_back_memory()
    kv = model.allocate_kv(config.kv_blocks, TORCH_DTYPE[config.kv_dtype])
    pace = Pace(device.slowdown, threads, sleeps=config.shares_core)
    spans: SpanMaker | None = None
    if config.ledger:
        kernel = KernelTime(device.cores, threads)
        spans = SpanMaker(
            config.replica_index, config.stage, config.rank, config.epoch, pace, kernel, threads, config.trace_segments
        )

    def wrap_group(group: Group) -> Group:
        return TimedGroup(group, spans) if spans is not None else group

    def wrap_pipe(pipe: Pipe, received: Op) -> Pipe:
        return TimedPipe(pipe, spans, received) if spans is not None else pipe

    wiring = connect(
        Segment.attach(config.segment_fd) if config.segment_fd >= 0 else None,
        layout_of(replica, config.links, config.spec.hidden, config.max_batch_tokens),
        replica, config.stage, config.rank, Seconds(config.wait_deadline_s),
        Seconds(0.0) if config.shares_core else SPIN, pace, wrap_group, wrap_pipe,
    )  # fmt: skip
    sampler = Sampler(wiring.group, config.rank, shard.head_rows, config.spec.vocab) if last else None
    slots = Slots(config.max_num_seqs, config.max_model_len, config.block_tokens)
    runner = Runner(
        model, sampler, slots, wiring, pace, first=first, last=last, rank=config.rank, hidden=config.spec.hidden
    )
    held = weight_bytes(shard, stage, config.spec, config.dtype)
    ready = Ready(
        device.name, os.getpid(), time.monotonic() - begin, held, kv.nbytes, kernels.isa(), model.weights_from
    )
    return Loaded(runner, ready, spans)


def serve(config: WorkerConfig, socket: "zmq.Socket[bytes]") -> None:
    """Load, say so, and run batches until told to stop. Raises whatever went wrong."""
    runner, ready, spans = load(config)
    socket.send(encode(ready))
    inbox = Inbox(socket, config.device.name, runner.pace, spans)
    while True:
        message = inbox.next()
        if isinstance(message, Stop):
            break
        started = time.monotonic_ns()
        result = runner.run(message.batch)
        if result is not None:
            ended = Nanoseconds(time.monotonic_ns())
            socket.send(encode(Done(config.replica_index, result, Nanoseconds(started), ended)))
        if spans is not None:
            spans.finished(message.batch.batch_id)
    if spans is not None:
        inbox.send_spans()


def main() -> int:
    """Run one worker. Returns the exit code; what went wrong is told to the control process first."""
    _die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the control process, which stops its workers
    config = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=WorkerConfig)
    if os.getppid() != config.control_pid:
        return 1  # it ended before the kernel was asked to tell
    name = config.device.name
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.IDENTITY, name.encode())
    socket.setsockopt(zmq.LINGER, 2000)
    socket.connect(config.endpoint)
    lost: Lost | None = None
    try:
        serve(config, socket)
    except WorkerLost as error:
        lost = Lost(name, error.device, error.reason)
    except EvenerError as error:
        lost = Lost(name, name, error.message)
    except Exception as error:  # whatever it is, the control process must hear of it
        traceback.print_exc()
        lost = Lost(name, name, f"{type(error).__name__}: {error}")
    if lost is not None:
        socket.send(encode(lost))
    socket.close()
    context.term()
    return 0 if lost is None else 1


if __name__ == "__main__":
    sys.exit(main())
