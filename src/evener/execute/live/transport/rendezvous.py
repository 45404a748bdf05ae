"""How the ranks of one replica find each other across hosts, and how they learn that one of them is lost."""

import contextlib
import socket
import threading
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any, Protocol, cast

import torch
import torch.distributed as dist

from evener.errors import InvalidDevice, WorkerLost
from evener.units import Seconds

DEADLINE = Seconds(60.0)
_SLICE = timedelta(seconds=0.1)
"""How often a wait looks whether the world was aborted."""
_ABORT = "abort"
_WATCHES = "watches"
_TOLD = "told"
"""Watches that were opened, and those that have read the reason of an abort."""
_FAREWELL = Seconds(0.5)
"""How long a closing rendezvous waits until every watch has read the reason; a dead rank never does."""

_c10d: Any = dist  # bindings without type stubs


class _Store(Protocol):
    def wait(self, keys: list[str], timeout: timedelta, /) -> None: ...
    def get(self, key: str, /) -> bytes: ...
    def add(self, key: str, count: int, /) -> int: ...
    def compare_set(self, key: str, expected: str, desired: str, /) -> bytes: ...
    def clone(self) -> "_Store": ...


class Backend(Protocol):
    """The part of ProcessGroupGloo and ProcessGroupNCCL in use. Tensors are flat and contiguous."""

    def allreduce(self, tensors: list[torch.Tensor], /) -> dist.Work: ...
    def broadcast(self, tensors: list[torch.Tensor], options: object, /) -> dist.Work: ...
    def alltoall_base(
        self, out: torch.Tensor, t: torch.Tensor, out_splits: list[int], splits: list[int], /
    ) -> dist.Work: ...
    def _allgather_base(self, out: torch.Tensor, t: torch.Tensor, /) -> dist.Work: ...


class Rendezvous:
    """Where the ranks of one replica and epoch find each other, kept by the control process.

    It listens on `host` alone, is not encrypted and asks for no password: give it a private address.
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        """Listen; port 0 takes a free one. Raises OSError."""
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
        self.host = host
        self.port: int = listener.getsockname()[1]
        # The store takes the descriptor over.
        self._store: _Store | None = _c10d.TCPStore(
            host, self.port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )

    def abort(self, device: str, reason: str) -> bool:
        """Make every present and future wait of the replica raise WorkerLost, within about 0.1 s.

        The first abort wins: True when it was this one.
        """
        return self._store is not None and _abort(self._store, device, reason)

    def close(self) -> None:
        """Stop listening; ranks still joined raise WorkerLost. Idempotent."""
        if self._store is not None:
            self.abort("control process", "the replica was closed")
            # A watch wakes first and asks for the reason then: the store must outlive its question.
            end = time.monotonic() + _FAREWELL
            while self._store.add(_TOLD, 0) < self._store.add(_WATCHES, 0) and time.monotonic() < end:
                time.sleep(0.001)
        self._store = None


class TorchWorld:
    """One rank's membership in a replica."""

    def __init__(
        self,
        host: str,
        port: int,
        device: str,
        backend: str = "gloo",
        deadline: Seconds = DEADLINE,
        address: str | None = None,
    ) -> None:
        """Join the rendezvous at host:port as `device`. Raises WorkerLost if it does not answer by the deadline.

        `backend`: "gloo" (CPU tensors) or "nccl" (CUDA tensors; set the current CUDA device first). `address`: of this
        host, for Gloo's connections; without it the one its host name resolves to.
        """
        if backend not in ("gloo", "nccl"):
            raise ValueError(f"backend {backend!r}; the backends are gloo and nccl")
        if backend == "nccl" and not (dist.is_nccl_available() and torch.cuda.is_available()):
            raise InvalidDevice(f"{device}: NCCL needs a CUDA device and a CUDA build of torch; CPU devices use gloo")
        self.device = device
        self.backend = backend
        self.tensor_device = "cuda" if backend == "nccl" else "cpu"
        self.deadline = deadline
        self._address = address
        self._lost: WorkerLost | None = None
        try:
            self._store: _Store = _c10d.TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=deadline), wait_for_workers=False
            )
            self._store.add(_WATCHES, 1)
        except RuntimeError as e:
            raise WorkerLost(f"{host}:{port}", f"the rendezvous does not answer: {_first_line(e)}") from None
        # A blocked wait holds its connection, so the watch has one of its own.
        threading.Thread(target=self._watch, args=(self._store.clone(),), name="abort-watch", daemon=True).start()

    def abort(self, device: str, reason: str) -> None:
        """Tell the whole replica that `device` is lost."""
        if self._lost is None:
            try:
                _abort(self._store, device, reason)
            except RuntimeError:  # the control process is gone, and its watch ends the others
                self._lost = WorkerLost(device, reason)

    def check(self) -> None:
        """Raises WorkerLost once the replica was aborted or its control process is gone."""
        if self._lost is not None:
            raise WorkerLost(self._lost.device, self._lost.reason)

    def wait(self, work: dist.Work, peers: str) -> None:
        """Until `work` is done; on NCCL only orders the current stream after it. `peers`: whom a loss would name.

        Raises WorkerLost: the replica was aborted, a connection broke, or the deadline passed.
        """
        if self.backend == "nccl":
            work.wait()  # orders the current stream after it; `settle` waits for the result
            return
        end = time.monotonic() + self.deadline
        while True:
            try:
                work.wait(_SLICE)
                return
            except RuntimeError:
                self.check()
                if work.is_completed():
                    # It may have been done just after the slice ran out: waiting again says which.
                    try:
                        work.wait(_SLICE)
                        return
                    except RuntimeError as failed:
                        reason = f"the connection failed: {_first_line(failed)}"
                elif time.monotonic() > end:
                    reason = f"did not take part within {self.deadline:.3g} s, the deadline"
                else:
                    continue
                self.abort(peers, reason)
                raise WorkerLost(peers, reason) from None

    def settle(self) -> None:
        """Wait until the current CUDA stream has run what was enqueued; nothing to do on CPU.

        Raises WorkerLost on an abort, or when the deadline passes. The stream may then still hold a stuck kernel: end
        the process.
        """
        if self.backend != "nccl":
            return
        event: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record()
        end = time.monotonic() + self.deadline
        while not event.query():
            self.check()
            if time.monotonic() > end:
                self.abort(self.device, f"its CUDA stream did not finish within {self.deadline:.3g} s")
                raise WorkerLost(self.device, f"its CUDA stream did not finish within {self.deadline:.3g} s")
            time.sleep(20e-6)

    def _watch(self, store: _Store) -> None:
        while True:
            try:
                store.wait([_ABORT], timedelta(hours=1))
                device, _, reason = store.get(_ABORT).decode().partition("\n")
                self._lost = WorkerLost(device, reason)
            except dist.DistStoreError:
                continue  # an hour without an abort
            except RuntimeError as e:
                self._lost = WorkerLost("control process", f"its rendezvous is gone: {_first_line(e)}")
                return
            with contextlib.suppress(RuntimeError):  # it closes meanwhile: the reason is known
                store.add(_TOLD, 1)
            return

    def connect(self, name: str, devices: Sequence[str]) -> Backend:
        """A process group of `devices`, in this order, which all call this with the same arguments.

        Raises WorkerLost when they do not all by the deadline.
        """
        if self.device not in devices:
            raise ValueError(f"{self.device} is not among the members of {name}: {', '.join(devices)}")
        rank, timeout = devices.index(self.device), timedelta(seconds=self.deadline)
        store = _c10d.PrefixStore(name, self._store)
        try:
            if self.backend == "nccl":
                options = _c10d.ProcessGroupNCCL.Options()
                options._timeout = timeout
                return cast(Backend, _c10d.ProcessGroupNCCL(store, rank, len(devices), options))
            return _gloo(store, rank, len(devices), timeout, self._address)
        except RuntimeError as e:
            self.check()
            others = ", ".join(d for d in devices if d != self.device)
            reason = f"did not all join {name} within {self.deadline:.3g} s: {_first_line(e)}"
            raise WorkerLost(others, reason) from None


def _gloo(store: _Store, rank: int, size: int, timeout: timedelta, address: str | None) -> Backend:
    if address is None:
        return cast(Backend, _c10d.ProcessGroupGloo(store, rank, size, timeout))
    options = _c10d.ProcessGroupGloo._Options()
    options._timeout = timeout
    options._devices = [_c10d.ProcessGroupGloo.create_device(hostname=address)]
    options._threads = 2
    return cast(Backend, _c10d.ProcessGroupGloo(store, rank, size, options))


def _abort(store: _Store, device: str, reason: str) -> bool:
    text = f"{device}\n{reason}"
    return store.compare_set(_ABORT, "", text).decode() == text


def _first_line(e: Exception) -> str:
    return str(e).split("\n", 1)[0]
