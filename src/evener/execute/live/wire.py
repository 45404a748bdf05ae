"""What crosses between the control process and its workers: typed records in msgpack, nothing executable.

Control -> worker: `Work`, `Stop`. Worker -> control: `Ready`, `Done`, `Spans`, `Lost`. A worker's configuration travels
once, over its standard input.
"""

import msgspec
from msgspec import Struct

from evener.engine.batch import Batch, BatchResult
from evener.ledger.spans import Span
from evener.spec.cluster import Device, Link
from evener.spec.model import ModelSpec
from evener.spec.plan import Replica
from evener.units import Nanoseconds


class WorkerConfig(Struct, frozen=True):
    """Everything one worker needs to know; it decides nothing itself."""

    model: str
    """Path of the weights, as `evener.model.source.open_model` takes it."""
    spec: ModelSpec
    replica: Replica
    replica_index: int
    stage: int
    rank: int
    """Index of this shard in its stage."""
    device: Device
    devices: tuple[Device, ...]
    """All devices of the replica, in plan order."""
    links: tuple[Link, ...]
    epoch: int
    dtype: str
    kv_dtype: str
    kv_blocks: int
    block_tokens: int
    max_num_seqs: int
    max_model_len: int
    max_batch_tokens: int
    control_pid: int
    """The process that started the worker; a worker that has lost it must end."""
    endpoint: str
    """ZeroMQ address of the control process."""
    segment_fd: int
    """File descriptor of the replica's shared-memory segment, inherited; -1 without one."""
    shares_core: bool
    """Another worker runs on one of this worker's cores: waiting must not burn it."""
    wait_deadline_s: float
    """A wait for a peer that lasts longer ends in WorkerLost."""
    ledger: bool = False
    """Report what each batch's time was spent on."""
    trace_segments: bool = False
    """Report every stretch of it too."""


class Stop(Struct, frozen=True, tag=True):
    """Finish what is queued and leave."""


class Work(Struct, frozen=True, tag=True):
    """A batch to run."""

    batch: Batch


class Ready(Struct, frozen=True, tag=True):
    """Weights are loaded and KV is allocated."""

    device: str
    pid: int
    load_s: float
    weight_bytes: int
    kv_bytes: int
    isa: str
    weights_from: str
    """In words, as `evener.model.packed_file.Kept.where`."""


class Done(Struct, frozen=True, tag=True):
    """The last stage's first rank finished a batch."""

    replica: int
    result: BatchResult
    started: Nanoseconds
    ended: Nanoseconds


class Spans(Struct, frozen=True, tag=True):
    """What a worker's time was spent on: every batch since the last such message, in order."""

    device: str
    spans: tuple[Span, ...]
    wait_cpu: Nanoseconds
    """CPU time that the worker's thread has spent inside operations since it was ready (spinning, copying)."""
    idle_cpu: Nanoseconds
    """CPU time that it has spent between batches (polling, reporting)."""


class Lost(Struct, frozen=True, tag=True):
    """This worker cannot go on: a peer is lost, or it failed itself. It exits after saying so."""

    device: str
    lost: str
    """The device that is lost, this one or a peer."""
    reason: str


ToWorker = Work | Stop
FromWorker = Ready | Done | Spans | Lost

encode = msgspec.msgpack.Encoder().encode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
