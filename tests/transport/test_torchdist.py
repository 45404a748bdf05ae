"""The torch.distributed transport over Gloo: values, waiting that ends, entries exchanged afterwards."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_threads, names

from evener.errors import InvalidDevice, WorkerLost
from evener.execute.live.transport.rendezvous import Rendezvous, TorchWorld
from evener.execute.live.transport.torchdist import TorchGroup, TorchPipe
from evener.units import Seconds

LOCAL = "127.0.0.1"


def join(rendezvous: Rendezvous, device: str, deadline: float = 30.0) -> TorchWorld:
    return TorchWorld(LOCAL, rendezvous.port, device, deadline=Seconds(deadline), address=LOCAL)


def trio(rendezvous: Rendezvous, deadline: float = 30.0) -> list[TorchGroup]:
    """The three ranks of one group."""
    return in_threads(3, lambda r: TorchGroup(join(rendezvous, f"cpu:{r}", deadline), "stage", names(3)))


@pytest.fixture(scope="module")
def groups() -> Iterator[list[TorchGroup]]:
    rendezvous = Rendezvous()
    opened = trio(rendezvous)
    yield opened
    for g in opened:
        g.close()
    rendezvous.close()


@settings(max_examples=15, deadline=None)
@given(
    shape=st.lists(st.integers(0, 40), max_size=3), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)  # fmt: skip
def test_collectives_agree_with_torch(
    groups: list[TorchGroup], shape: list[int], seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(3, *shape, generator=generator).to(dtype) for _ in range(3)]

    def body(rank: int) -> list[torch.Tensor]:
        t = parts[rank]
        summed, gathered, exchanged = t.clone(), t.new_empty(3, *t.shape), torch.empty_like(t)
        groups[rank].all_reduce(summed)
        groups[rank].all_gather(t, gathered)
        groups[rank].all_to_all(t, exchanged)
        return [summed, gathered, exchanged]

    results = in_threads(3, body)
    want = torch.stack(parts).double().sum(0)
    for rank, (summed, gathered, exchanged) in enumerate(results):
        # The order of the sum is Gloo's, but all ranks have the same bits.
        assert torch.equal(summed, results[0][0])
        torch.testing.assert_close(summed.double(), want, atol=1e-5 if dtype == torch.float32 else 0.1, rtol=1e-5)
        assert torch.equal(gathered, torch.stack(parts))
        assert torch.equal(exchanged, torch.stack([p[rank] for p in parts]))


def test_entries_exchanged_afterwards_name_the_straggler(groups: list[TorchGroup]) -> None:
    in_threads(3, lambda r: groups[r].exchange_entries())

    def body(rank: int) -> tuple[list[int], list[int]]:
        entered = []
        for _ in range(3):
            if rank == 2:
                time.sleep(0.1)
            stamp = groups[rank].all_reduce(torch.ones(4))
            assert stamp.entered == stamp.arrived <= stamp.ended
            entered.append(stamp.entered)
        return entered, [*groups[rank].exchange_entries()]

    (_, a), (_, b), (entered, c) = in_threads(3, body)
    assert a == b == c == entered


def test_a_pipe_keeps_order_and_does_not_wait_for_its_receiver() -> None:
    rendezvous = Rendezvous()
    pipes = in_threads(2, lambda r: TorchPipe(join(rendezvous, f"cpu:{r}"), "p", "cpu:0", "cpu:1", depth=4))
    sent = torch.arange(10)
    for _ in range(4):
        pipes[0].send(sent)
        sent += 1  # the pipe took a copy

    def body(rank: int) -> None:
        for i in range(4 if rank == 0 else 0, 12):
            if rank == 0:
                pipes[0].send(torch.arange(10) + i)
            else:
                out = torch.empty(10, dtype=torch.int64)
                pipes[1].recv(out)
                assert torch.equal(out, torch.arange(10) + i)
        pipes[rank].close()

    in_threads(2, body)
    with pytest.raises(ValueError, match="can send, not recv"):
        pipes[0].recv(sent)
    with pytest.raises(ValueError, match="closed"):
        pipes[0].send(sent)
    rendezvous.close()


def test_abort_ends_present_and_future_waits() -> None:
    rendezvous = Rendezvous()
    opened = trio(rendezvous, deadline=60)
    threading.Timer(0.3, lambda: rendezvous.abort("cpu:2", "exited with signal 9")).start()

    def body(rank: int) -> None:
        with pytest.raises(WorkerLost, match="worker cpu:2 lost: exited with signal 9"):
            opened[rank].all_reduce(torch.ones(3))
        with pytest.raises(WorkerLost, match="signal 9"):
            opened[rank].all_reduce(torch.ones(3))

    in_threads(2, body)
    assert not rendezvous.abort("cpu:0", "later")
    rendezvous.close()


def test_a_deadline_ends_a_wait_and_tells_the_replica() -> None:
    rendezvous = Rendezvous()
    opened = trio(rendezvous, deadline=5)
    opened[0]._world.deadline = Seconds(0.3)  # joining may take longer than this wait
    with pytest.raises(WorkerLost, match=r"one of cpu:1, cpu:2 lost: did not take part within 0.3 s"):
        opened[0].all_reduce(torch.ones(3))
    with pytest.raises(WorkerLost, match="did not take part"):
        opened[1].all_reduce(torch.ones(3))
    rendezvous.close()


def test_members_that_never_join_are_named() -> None:
    rendezvous = Rendezvous()
    with pytest.raises(WorkerLost, match=r"worker cpu:1 lost: did not all join group/stage within 1 s"):
        TorchGroup(join(rendezvous, "cpu:0", deadline=1), "stage", names(2))
    rendezvous.close()


def test_a_control_process_that_goes_ends_the_replica() -> None:
    rendezvous = Rendezvous()
    opened = in_threads(2, lambda r: TorchGroup(join(rendezvous, f"cpu:{r}", 60), "stage", names(2)))
    rendezvous._store = None  # gone without a word
    with pytest.raises(WorkerLost, match="rendezvous is gone"):
        opened[0].all_reduce(torch.ones(3))
    rendezvous = Rendezvous()
    closed = in_threads(2, lambda r: TorchGroup(join(rendezvous, f"cpu:{r}", 60), "stage", names(2)))
    rendezvous.close()
    with pytest.raises(WorkerLost, match="the replica was closed"):
        closed[0].all_reduce(torch.ones(3))


def test_what_cannot_work_is_refused() -> None:
    rendezvous = Rendezvous()
    world = join(rendezvous, "cpu:0")
    with pytest.raises(ValueError, match="cpu:0 is not among"):
        TorchGroup(world, "stage", ("cpu:1", "cpu:2"))
    with pytest.raises(ValueError, match="backends are gloo and nccl"):
        TorchWorld(LOCAL, rendezvous.port, "cpu:0", backend="mpi")
    group = TorchGroup(world, "alone", ("cpu:0",))
    with pytest.raises(ValueError, match="int64; float32 and bfloat16"):
        group.all_reduce(torch.ones(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="contiguous"):
        group.all_reduce(torch.ones(4, 4).t()[1:])
    with pytest.raises(ValueError, match="on meta over gloo"):
        group.all_reduce(torch.ones(4, device="meta"))
    if not torch.cuda.is_available():
        with pytest.raises(InvalidDevice, match="NCCL needs a CUDA device"):
            TorchWorld(LOCAL, rendezvous.port, "cuda:0", backend="nccl")
    rendezvous.close()
    with pytest.raises(WorkerLost, match="does not answer"):
        TorchWorld(LOCAL, rendezvous.port, "cpu:0", deadline=Seconds(0.5))


def test_a_rendezvous_leaves_nothing_open() -> None:
    def open_files() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = open_files()
    for _ in range(5):
        Rendezvous().close()
    assert open_files() == before


def test_an_hour_without_an_abort_is_not_a_loss() -> None:
    # What the watch relies on: a wait that times out is told apart from a lost connection.
    rendezvous = Rendezvous()
    world = join(rendezvous, "cpu:0")
    with pytest.raises(torch.distributed.DistStoreError):
        world._store.clone().wait(["never"], timedelta(milliseconds=50))
    rendezvous.close()


PEER = """
import sys, time
from evener.execute.live.transport.rendezvous import TorchWorld
from evener.execute.live.transport.torchdist import TorchGroup
group = TorchGroup(TorchWorld("127.0.0.1", int(sys.argv[1]), "cpu:1", address="127.0.0.1"), "s", ("cpu:0", "cpu:1"))
print("joined", flush=True)
time.sleep(600)
"""


@pytest.mark.slow
def test_a_killed_peer_is_noticed_by_its_connection() -> None:
    rendezvous = Rendezvous()
    peer = subprocess.Popen([sys.executable, "-c", PEER, str(rendezvous.port)], stdout=subprocess.PIPE, text=True)
    try:
        group = TorchGroup(join(rendezvous, "cpu:0", deadline=60), "s", ("cpu:0", "cpu:1"))
        assert peer.stdout is not None and peer.stdout.readline() == "joined\n"
        threading.Timer(0.2, lambda: os.kill(peer.pid, signal.SIGKILL)).start()
        with pytest.raises(WorkerLost, match="worker cpu:1 lost: the connection failed"):
            group.all_reduce(torch.ones(3))
    finally:
        peer.kill()
        peer.communicate()
        rendezvous.close()
