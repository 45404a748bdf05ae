"""Collectives between ranks, behind one interface, whatever carries them.

A *group* is the ranks of one stage (tensor parallelism). A *pipe* is a one-way channel between two ranks.
Every wait ends in data or in `WorkerLost`; none hangs: the host can abort a group, and each wait has a deadline.

Every operation returns a `Stamp`, on the host-wide monotonic clock, so that who waits is told apart from who is
late: `arrived - entered` is waiting for peers (straggler), `ended - arrived` is the transfer itself. It also carries
the thread's CPU time at both ends, so that what lies between two operations can be told from losing the core.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import torch

from evener.kernels.layers import Batch, Layers
from evener.units import Nanoseconds


class Stamp(NamedTuple):
    """When this rank entered an operation, when the last rank had entered, and when this rank was done."""

    entered: Nanoseconds
    arrived: Nanoseconds
    ended: Nanoseconds
    cpu_entered: Nanoseconds = Nanoseconds(0)
    """CPU time of the calling thread at `entered`."""
    cpu_ended: Nanoseconds = Nanoseconds(0)
    """At `ended`; reckoned from the time that passed where the operation was quick and did not sleep."""


class Group(Protocol):
    """Collectives among the ranks of one stage. All ranks must call the same operations in the same order.

    Tensors are contiguous, on the rank's device. The sum is taken in rank order, so every rank gets the same bits.
    Raises WorkerLost when a peer is gone, the group is aborted, or the deadline passes.
    """

    rank: int
    size: int

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        """Sum over ranks, in place, any shape, fp32 (bf16 where the transport says so)."""
        ...

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """`out` [size, *t.shape] receives every rank's `t` in rank order; any dtype."""
        ...

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """`t` [size, ...] and `out` [size, ...]: out[r] on this rank is t[this rank] of rank r; any dtype."""
        ...

    def close(self) -> None:
        """Release resources; idempotent."""
        ...


@runtime_checkable
class RunsLayers(Protocol):
    """A group that also runs whole layers with their sums, so that Python has no part in them."""

    def run_layers(self, layers: Layers, batch: Batch, x_TH: torch.Tensor) -> list[Stamp]:
        """`layers` on `batch`, each half followed by an all_reduce; x_TH is updated in place. The sums' stamps."""
        ...


class Pipe(Protocol):
    """A one-way, ordered, bounded channel of tensors between two ranks (activations, sampled tokens)."""

    def send(self, t: torch.Tensor) -> Stamp:
        """Copy `t` into the pipe; waits while it is full. Raises WorkerLost."""
        ...

    def recv(self, out: torch.Tensor) -> Stamp:
        """Fill `out` with the next message, whose byte size must be equal. Raises WorkerLost."""
        ...

    def poll(self) -> bool:
        """True if a message has begun to arrive, so that `recv` will not wait for its sender to start."""
        ...

    def close(self) -> None:
        """Release resources; idempotent."""
        ...
