"""Collectives and pipes over torch.distributed: Gloo for CPU tensors, NCCL for CUDA tensors, across hosts.

The control process opens a `Rendezvous` for one replica and epoch; each worker joins it and opens the groups and pipes
it is part of, by a name that all their members agree on. torch's global default group is not used, so one process may
be in several.

    rendezvous = Rendezvous("10.0.0.1")                                # control process
    rendezvous.abort("cpu:1", "exited with signal 9")                  # when a worker is lost

    world = TorchWorld("10.0.0.1", port, "cpu:0")                      # worker
    group = TorchGroup(world, "stage 0", ("cpu:0", "cpu:1"))
    pipe = TorchPipe(world, "stage 0 to 1", "cpu:0", "cpu:2")

What differs from shared memory:

- The order of a sum is the backend's. Gloo and NCCL give every rank the same bits, but not the bits of rank order.
- Nobody knows the peers' entries while an operation runs: `arrived` is `entered`. `exchange_entries` joins them later.
- A lost peer is noticed by its connection, which does not always tell which of several peers it was.
- On CUDA an operation is enqueued on the current stream: `ended` is when it was enqueued, and waiting for the result is
  `TorchWorld.settle()`, which is what ends in WorkerLost.
"""

import time
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from evener.execute.live.transport.base import Stamp
from evener.execute.live.transport.rendezvous import Backend, TorchWorld
from evener.units import Nanoseconds

_c10d: Any = dist  # bindings without type stubs
_MAX_ENTRIES = 1 << 16


class _Entry(NamedTuple):
    """When the calling thread entered an operation, on the wall and on its own CPU clock."""

    at: int
    cpu: int


class _Member:
    """What groups and pipes share."""

    def __init__(self, world: TorchWorld, name: str, devices: Sequence[str]) -> None:
        self._world = world
        others = [d for d in devices if d != world.device]
        self._peers = others[0] if len(others) == 1 else "one of " + ", ".join(others)
        self._backend: Backend | None = world.connect(name, devices)

    def close(self) -> None:
        """Release the connections; idempotent."""
        self._backend = None

    def _enter(self, *tensors: torch.Tensor) -> tuple[Backend, _Entry]:
        self._world.check()
        if self._backend is None:
            raise ValueError("the group or pipe is closed")
        for t in tensors:
            if t.device.type != self._world.tensor_device:
                raise ValueError(
                    f"a tensor on {t.device} over {self._world.backend}, which carries "
                    f"{self._world.tensor_device} tensors only"
                )
            if not t.is_contiguous():
                raise ValueError(f"tensor {list(t.shape)} is not contiguous; pass t.contiguous()")
        return self._backend, _Entry(time.monotonic_ns(), time.thread_time_ns())

    def _wait(self, work: dist.Work) -> None:
        self._world.wait(work, self._peers)


class TorchGroup(_Member):
    """`base.Group` over torch.distributed. all_reduce sums fp32 and bf16 (bf16 as the backend rounds it)."""

    def __init__(self, world: TorchWorld, name: str, devices: Sequence[str]) -> None:
        """Connect to the other `devices` (rank order), which all do the same. Raises WorkerLost."""
        super().__init__(world, f"group/{name}", devices)
        self.rank = devices.index(world.device)
        self.size = len(devices)
        self._entries: deque[int] = deque(maxlen=_MAX_ENTRIES)

    def all_reduce(self, t: torch.Tensor) -> Stamp:
        """See `base.Group`."""
        if t.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"all_reduce of {t.dtype}; float32 and bfloat16 are summed")
        backend, entered = self._enter(t)
        self._entries.append(entered.at)
        self._wait(backend.allreduce([t]))
        return _stamp(entered)

    def all_gather(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See `base.Group`."""
        if out.dtype != t.dtype or out.shape != (self.size, *t.shape):
            raise ValueError(f"all_gather of {list(t.shape)} over {self.size} ranks into {list(out.shape)}")
        backend, entered = self._enter(t, out)
        self._entries.append(entered.at)
        if t.numel() > 0:
            self._wait(backend._allgather_base(_flat(out), _flat(t)))
        return _stamp(entered)

    def all_to_all(self, t: torch.Tensor, out: torch.Tensor) -> Stamp:
        """See `base.Group`."""
        if out.dtype != t.dtype or out.shape != t.shape or t.dim() == 0 or t.shape[0] != self.size:
            raise ValueError(f"all_to_all of {list(t.shape)} into {list(out.shape)}; both must be [{self.size}, ...]")
        backend, entered = self._enter(t, out)
        self._entries.append(entered.at)
        if t.numel() > 0:
            self._wait(backend.alltoall_base(_flat(out), _flat(t), [], []))
        return _stamp(entered)

    def exchange_entries(self) -> list[Nanoseconds]:
        """When the last rank had entered each operation since the previous exchange: what `arrived` should have been.

        A collective itself; all ranks call it at the same point. Entries are compared as they are, so this is right on
        one host's clock only; across hosts correct for the clocks first. At most the last 65,536 operations.
        """
        mine = torch.tensor(self._entries, dtype=torch.int64, device=self._world.tensor_device)
        self._entries.clear()
        everyone = mine.new_empty(self.size, len(mine))
        if len(mine) > 0:
            backend, _ = self._enter(mine)
            self._wait(backend._allgather_base(everyone.view(-1), mine))
            self._world.settle()
        return [Nanoseconds(int(x)) for x in everyone.amax(0).tolist()]


class TorchPipe(_Member):
    """`base.Pipe` over torch.distributed. A message is a broadcast between two ranks, so both must name its size.

    A sender copies and goes on until `depth` messages are under way. Messages of unequal sizes at the two ends are a
    mistake that breaks the connection (WorkerLost). `arrived` is `entered` at both ends.
    """

    def __init__(self, world: TorchWorld, name: str, sender: str, receiver: str, depth: int = 8) -> None:
        """Connect one end; which one follows from the world's device. Raises WorkerLost."""
        super().__init__(world, f"pipe/{name}", (sender, receiver))
        self.role = "send" if world.device == sender else "recv"
        self._depth = depth
        self._under_way: deque[tuple[dist.Work, torch.Tensor]] = deque()

    def send(self, t: torch.Tensor) -> Stamp:
        """See `base.Pipe`."""
        backend, entered = self._enter_as("send", t)
        while self._under_way and (len(self._under_way) >= self._depth or self._under_way[0][0].is_completed()):
            self._wait(self._under_way[0][0])
            self._under_way.popleft()
        copy = t.detach().clone()
        if t.numel() > 0:
            self._under_way.append((backend.broadcast([_flat(copy)], _from_sender()), copy))
        return _stamp(entered)

    def recv(self, out: torch.Tensor) -> Stamp:
        """See `base.Pipe`."""
        backend, entered = self._enter_as("recv", out)
        if out.numel() > 0:
            self._wait(backend.broadcast([_flat(out)], _from_sender()))
        return _stamp(entered)

    def close(self) -> None:
        """See `base.Pipe`. Waits for messages under way; raises WorkerLost when they cannot arrive."""
        try:
            while self._under_way:
                self._wait(self._under_way.popleft()[0])
        finally:
            self._under_way.clear()
            super().close()

    def _enter_as(self, role: str, t: torch.Tensor) -> tuple[Backend, _Entry]:
        if role != self.role:
            raise ValueError(f"this end of the pipe can {self.role}, not {role}")
        return self._enter(t)


def _from_sender() -> object:
    options = _c10d.BroadcastOptions()
    options.rootRank = 0
    options.rootTensor = 0
    return options


def _flat(t: torch.Tensor) -> torch.Tensor:
    """Its bytes: any dtype goes over any backend."""
    return t.view(-1).view(torch.uint8)


def _stamp(entry: _Entry) -> Stamp:
    entered = Nanoseconds(entry.at)
    cpu, ended = Nanoseconds(time.thread_time_ns()), Nanoseconds(time.monotonic_ns())
    return Stamp(entered, entered, ended, Nanoseconds(entry.cpu), cpu)
