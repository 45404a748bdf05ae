"""A declared slow-down: real ranks behave as unlike hardware on any machine.

The time that a slower device would need on top is owed, accumulates, and is slept before the next operation that
others can see. Sleeping burns no core that another rank needs; the recorded stretch is the truth.
"""

import time
from typing import Any

import torch

from evener.execute.live.transport.base import Group, Pipe, Stamp

_SMALLEST_SLEEP_NS = 100_000
"""Shorter sleeps are late by about as much as they last."""


class Pace:
    """Owes `(slowdown - 1)` times the thread's CPU time, and sleeps it."""

    def __init__(self, slowdown: float) -> None:
        self.slowdown = slowdown
        self.owed_ns = 0.0
        self.slept_ns = 0
        self._cpu_ns = time.thread_time_ns()

    def pay(self) -> None:
        """Sleep what is owed since the last call; what is too short to sleep stays owed."""
        cpu = time.thread_time_ns()
        self.owed_ns += (cpu - self._cpu_ns) * (self.slowdown - 1.0)
        self._cpu_ns = cpu
        if self.owed_ns >= _SMALLEST_SLEEP_NS:
            begin = time.monotonic_ns()
            time.sleep(self.owed_ns / 1e9)
            slept = time.monotonic_ns() - begin
            self.owed_ns -= slept
            self.slept_ns += slept

    def skip(self, stamp: Stamp) -> None:
        """An operation of a transport is not the device's own work: owe nothing for it, but for the way into it."""
        self.owed_ns += (stamp.cpu_entered - self._cpu_ns) * (self.slowdown - 1.0)
        self._cpu_ns = stamp.cpu_ended


class PacedGroup:
    """A Group that pays what the device owes before each operation."""

    def __init__(self, inner: Group, pace: Pace) -> None:
        self._inner = inner
        self._pace = pace
        self.rank = inner.rank
        self.size = inner.size

    def _run(self, operation: Any, *tensors: torch.Tensor) -> Stamp:
        self._pace.pay()
        stamp: Stamp = operation(*tensors)
        self._pace.skip(stamp)
        return stamp

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        """See Group."""
        return self._run(self._inner.all_reduce, t)

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See Group."""
        return self._run(self._inner.all_gather, t, out)

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See Group."""
        return self._run(self._inner.all_to_all, t, out)

    def close(self) -> None:
        """See Group."""
        self._inner.close()


class PacedPipe:
    """A Pipe that pays what the device owes before each send."""

    def __init__(self, inner: Pipe, pace: Pace) -> None:
        self._inner = inner
        self._pace = pace

    def send(self, t: torch.Tensor) -> Stamp:
        """See Pipe."""
        self._pace.pay()
        stamp = self._inner.send(t)
        self._pace.skip(stamp)
        return stamp

    def recv(self, out: torch.Tensor) -> Stamp:
        """See Pipe."""
        stamp = self._inner.recv(out)
        self._pace.skip(stamp)
        return stamp

    def poll(self) -> bool:
        """See Pipe."""
        return self._inner.poll()

    def close(self) -> None:
        """See Pipe."""
        self._inner.close()
