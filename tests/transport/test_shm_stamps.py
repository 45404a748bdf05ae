"""Stamps tell who waits from who is late."""

import time

import torch
from ranks import in_threads, names, pipe_ends, with_group

from evener.execute.live.transport.base import Stamp
from evener.execute.live.transport.layout import GroupSpec, PipeSpec
from evener.execute.live.transport.shm import ShmGroup
from evener.units import Seconds


def late_rank(group: ShmGroup) -> list[Stamp]:
    t, gathered = torch.ones(group.size, 40_000), torch.empty(group.size, group.size, 40_000)
    stamps = []
    for call in (
        lambda: group.all_reduce(t),
        lambda: group.all_reduce(t[:, :10].contiguous()),
        lambda: group.all_gather(t, gathered),
        lambda: group.all_to_all(t, torch.empty_like(t)),
    ):
        if group.rank == 1:
            time.sleep(0.2)
        stamps.append(call())
    return stamps


def test_a_late_rank_shows_as_waiting_on_the_others() -> None:
    results = with_group(GroupSpec(names(3)), late_rank)
    for of_one_operation in zip(*results, strict=True):
        late = of_one_operation[1]
        for stamp in of_one_operation:
            assert stamp.entered <= stamp.arrived <= stamp.ended
            assert stamp.arrived == max(s.entered for s in of_one_operation)
        assert late.arrived == late.entered
        for waiter in (of_one_operation[0], of_one_operation[2]):
            assert waiter.arrived - waiter.entered >= 40e6


def test_the_clock_is_the_hosts_monotonic_clock() -> None:
    before = time.monotonic_ns()
    stamps = with_group(GroupSpec(names(2)), lambda g: g.all_reduce(torch.zeros(8)))
    after = time.monotonic_ns()
    alone = with_group(GroupSpec(names(1)), lambda g: g.all_reduce(torch.zeros(8)))
    assert all(before <= s.entered <= s.ended <= after for s in stamps)
    assert alone[0].entered == alone[0].arrived == alone[0].ended


def test_a_late_sender_shows_as_waiting_on_the_receiver() -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1"))

    def body(rank: int) -> Stamp:
        if rank == 0:
            time.sleep(0.2)
            return sender.send(torch.ones(4))
        return receiver.recv(torch.zeros(4))

    sent, received = in_threads(2, body)
    assert received.arrived == sent.entered == sent.arrived
    assert received.arrived - received.entered >= 40e6
    assert received.arrived <= received.ended
    segment.close()


def test_a_declared_link_counts_as_transfer() -> None:
    # Two ranks exchange 40,000 bytes at 1 MB/s and 10 ms: 50 ms from the last arrival on.
    spec = GroupSpec(names(2), delay=Seconds(0.01), bandwidth=1e6)
    for stamp in with_group(spec, lambda g: g.all_reduce(torch.ones(10_000))):
        assert stamp.ended - stamp.arrived >= 50e6
