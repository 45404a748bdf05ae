"""What bodies and brain report to the ledger: spans from the devices, facts from the brain. Pure data.

All times are absolute nanoseconds of one clock: the host's monotonic clock live, the virtual clock in simulation.
"""

from enum import IntEnum
from typing import Protocol

from msgspec import Struct

from evener.cost.base import BatchShape
from evener.units import Nanoseconds


class Op(IntEnum):
    """Kinds of segments inside a span."""

    COMPUTE = 0
    ALL_REDUCE = 1
    ALL_GATHER = 2
    ALL_TO_ALL = 3
    SEND = 4
    """Activations (or sampled tokens) into a pipe."""
    RECV = 5
    """Activations from the stage before."""
    TOKENS = 6
    """Sampled tokens from the last stage."""


class Traffic(Struct, frozen=True, array_like=True):
    """All operations of one kind within a span."""

    op: int
    count: int
    nbytes: int
    """Bytes that this rank put in or took out."""
    waited: Nanoseconds
    """Sum of `arrived - entered`: straggler in collectives, bubble in RECV and TOKENS, a full pipe in SEND."""
    moving: Nanoseconds
    """Sum of `ended - arrived`: transfer."""


class Segment(Struct, frozen=True, array_like=True):
    """One stretch inside a span, for traces. A COMPUTE segment has `arrived == entered`."""

    op: int
    entered: Nanoseconds
    arrived: Nanoseconds
    """When the last rank had entered."""
    ended: Nanoseconds
    value: int
    """COMPUTE: CPU nanoseconds of the thread; otherwise bytes."""


class Span(Struct, frozen=True, array_like=True):
    """One batch (or `repeat` consecutive decode steps with the same rows) on one device.

    `compute + contended + straggler + transfer + bubble + host <= ended - began`; the difference is unattributed.
    Spans of one device do not overlap and come in order.
    """

    replica: int
    stage: int
    rank: int
    """Place of the shard in its stage."""
    epoch: int
    batch_id: int
    """The (first) batch."""
    began: Nanoseconds
    ended: Nanoseconds
    compute: Nanoseconds
    """Own work; a declared slow-down's sleep belongs to it, and what it waited for its core instead of sleeping."""
    cpu: Nanoseconds
    """CPU time that the device's threads report for `compute` (live, without declared sleep), or `compute`."""
    contended: Nanoseconds
    """Descheduled within the span while it had work."""
    straggler: Nanoseconds
    transfer: Nanoseconds
    bubble: Nanoseconds
    """Waited for another stage of the replica."""
    idle_contended: Nanoseconds = Nanoseconds(0)
    """Descheduled between the previous span's end and `began`: it was woken and got no core."""
    repeat: int = 1
    """Steps that the span covers; `issued` and `done` are told once, for `batch_id`."""
    host: Nanoseconds = Nanoseconds(0)
    """Where `repeat` > 1: gaps between the steps, in which the next one was issued and not begun."""
    traffic: tuple[Traffic, ...] = ()
    segments: tuple[Segment, ...] = ()
    """Only while segments are recorded; they tile [began, ended)."""


class MakeUp(Struct, frozen=True, array_like=True):
    """What a batch consists of, to divide its compute time."""

    shape: BatchShape
    recompute_tokens: int = 0
    """Of `shape.prefill_tokens`: computed before, and lost."""


class HoldKind(IntEnum):
    """Why the brain does not issue to a replica."""

    NONE = 0
    KV = 1
    """KV blocks are short (`kv_blocks`, `preempting`)."""
    POLICY = 2
    """The policy waits (`static_batch_fills`, `static_batch_runs`)."""


class Journal(Protocol):
    """What the brain tells as it decides. Calls come in order of `now`. The ledger is one; None costs nothing."""

    def issued(self, replica: int, batch_id: int, now: Nanoseconds, made_of: MakeUp) -> None:
        """A batch was handed over."""
        ...

    def done(self, replica: int, batch_id: int, now: Nanoseconds, late_rows: int) -> None:
        """Its result was consumed; `late_rows` of its decode rows had ended before (speculation)."""
        ...

    def state(self, replica: int, now: Nanoseconds, hold: HoldKind, unfinished: bool, short_of_kv: bool) -> None:
        """From `now` on. Called on changes only. `short_of_kv`: a request waits for blocks, batches may run."""
        ...

    def waiting(self, now: Nanoseconds, anybody: bool) -> None:
        """Whether any request waits at any replica, from `now` on. Called on changes only."""
        ...

    def down(self, replica: int, now: Nanoseconds, reason: str) -> None:
        """The replica computes nothing from `now` on; what it had in flight never ends."""
        ...

    def request(self, request_id: str, replica: int, now: Nanoseconds, what: "Milestone", tokens: int) -> None:
        """A request reached a milestone; `tokens`: its prompt (ARRIVED), or its output so far."""
        ...


class Milestone(IntEnum):
    """Of a request's life. ARRIVED and ENDED come once, the others may repeat after a preemption or a move."""

    ARRIVED = 0
    ADMITTED = 1
    """Its first chunk was issued."""
    FIRST_TOKEN = 2
    PREEMPTED = 3
    MOVED = 4
    """To another replica."""
    ENDED = 5
