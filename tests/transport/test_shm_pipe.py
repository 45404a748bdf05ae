"""Pipes: order, streaming past the ring's size, and what a declared link does."""

import threading
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import in_threads, pipe_ends

from evener.execute.live.transport.layout import PipeSpec
from evener.units import Bytes, Seconds


def message(i: int, nbytes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(i)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.one_of(st.integers(0, 200), st.integers(900, 5000), st.integers(20_000, 30_000)), max_size=12),
    capacity=st.sampled_from([4096, 4160, 16384, 65536]),
)
def test_messages_arrive_whole_and_in_order(sizes: list[int], capacity: int) -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1", Bytes(capacity)))

    def body(rank: int) -> list[torch.Tensor]:
        got = []
        for i, n in enumerate(sizes):
            if rank == 0:
                sender.send(message(i, n))
            else:
                got.append(torch.empty(n, dtype=torch.uint8))
                receiver.recv(got[-1])
        return got

    _, got = in_threads(2, body)
    assert all(torch.equal(t, message(i, n)) for i, (n, t) in enumerate(zip(sizes, got, strict=True)))
    assert not receiver.poll()
    segment.close()


def test_poll_and_try_recv_do_not_wait() -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1"))
    out = torch.zeros(3)
    assert not receiver.poll() and receiver.try_recv(out) is None
    sender.send(torch.tensor([1.0, 2.0, 3.0]))
    assert receiver.poll() and receiver.try_recv(out) is not None
    assert out.tolist() == [1.0, 2.0, 3.0] and not receiver.poll()
    segment.close()


def test_a_message_of_another_size_stays() -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1"))
    sender.send(torch.ones(3))
    with pytest.raises(ValueError, match="has 12 bytes, the tensor to fill has 8"):
        receiver.recv(torch.zeros(2))
    out = torch.zeros(3)
    receiver.recv(out)
    assert out.tolist() == [1.0, 1.0, 1.0]
    with pytest.raises(ValueError, match="can recv, not send"):
        receiver.send(out)
    receiver.close()
    with pytest.raises(ValueError, match="closed"):
        receiver.recv(out)
    segment.close()


def test_a_full_pipe_holds_the_sender_until_the_receiver_enters() -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1", Bytes(4096)))
    t, out = torch.ones(900), torch.zeros(900)
    first = sender.send(t)
    assert first.arrived == first.entered  # there was room
    receive = threading.Timer(0.3, lambda: [receiver.recv(out), receiver.recv(out)])
    receive.start()
    stamp = sender.send(t)  # no room: waits for the receive that makes some
    assert stamp.arrived - stamp.entered >= 40e6
    assert stamp.entered <= stamp.arrived <= stamp.ended
    receive.join()
    segment.close()


def test_a_declared_link_delays_and_serialises() -> None:
    # 20 ms one way and 1 MB/s: two messages of 10,000 bytes are due 30 and 40 ms after they were sent together.
    spec = PipeSpec("cpu:0", "cpu:1", delay=Seconds(0.02), bandwidth=1e6)
    segment, sender, receiver = pipe_ends(spec)
    first = sender.send(message(0, 10_000))
    sender.send(message(1, 10_000))
    out = torch.empty(10_000, dtype=torch.uint8)
    a = receiver.recv(out)
    assert torch.equal(out, message(0, 10_000))
    b = receiver.recv(out)
    assert torch.equal(out, message(1, 10_000))
    assert a.ended - first.entered >= 30e6
    assert b.ended - first.entered >= 40e6
    # The link's time counts as transfer, not as waiting for a late peer.
    assert a.arrived == a.entered
    cpu = time.thread_time()
    sender.send(message(2, 10_000))
    receiver.recv(out)
    assert time.thread_time() - cpu < 0.02  # slept, not burnt (30 ms of it)
    segment.close()
