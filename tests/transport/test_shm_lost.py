"""A wait ends in data or in WorkerLost: abort, deadline, killed and stopped peers; nothing is left behind."""

import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from ranks import Ranks, in_threads, names, pipe_ends

from evener.errors import WorkerLost
from evener.execute.live.transport.layout import GroupSpec, PipeSpec, SegmentLayout
from evener.execute.live.transport.shm import Segment, ShmGroup, ShmPipe
from evener.units import Bytes, Seconds

LAYOUT = SegmentLayout.plan([GroupSpec(names(3)), GroupSpec(names(3))], [PipeSpec("cpu:0", "cpu:1", Bytes(4096))])


def test_abort_ends_present_and_future_waits() -> None:
    segment = Segment.create(LAYOUT)

    def body(i: int) -> WorkerLost:
        if i == 3:
            time.sleep(0.1)  # by now the others sleep
            assert segment.abort("cpu:2", "exited with signal 9")
            assert not segment.abort("cpu:0", "a later reason")
        with pytest.raises(WorkerLost) as e:
            if i < 2:
                ShmGroup(segment, LAYOUT.groups[0], i).all_reduce(torch.ones(4))
            elif i == 2:
                ShmPipe(segment, LAYOUT.pipes[0], "recv").recv(torch.ones(4))
            else:
                ShmPipe(segment, LAYOUT.pipes[0], "send").send(torch.ones(4))
        return e.value

    for lost in in_threads(4, body):
        assert (lost.device, lost.reason) == ("cpu:2", "exited with signal 9")
    assert segment.lost is not None and segment.lost.device == "cpu:2"
    with pytest.raises(WorkerLost):
        ShmPipe(segment, LAYOUT.pipes[0], "recv").poll()
    segment.close()


def test_a_deadline_names_who_had_not_arrived_and_ends_the_segment() -> None:
    segment = Segment.create(LAYOUT)

    def body(rank: int) -> WorkerLost:
        attached = Segment.attach(os.open(segment.path, os.O_RDWR))
        group = ShmGroup(attached, LAYOUT.groups[0], rank, deadline=Seconds(1.0))
        attached.close()  # the group has its own hold
        assert not attached.abort("cpu:0", "closed")
        with pytest.raises(WorkerLost) as e:
            group.all_reduce(torch.ones(4))
        return e.value

    for lost in in_threads(2, body):  # rank 2 never comes
        assert lost.device == "cpu:2"
        assert "rank 2 had not arrived at collective 0" in lost.reason and "within 1 s" in lost.reason
    with pytest.raises(WorkerLost, match="rank 2"):
        body_of_late_rank = ShmGroup(segment, LAYOUT.groups[0], 2)
        body_of_late_rank.all_reduce(torch.ones(4))
    segment.close()


@pytest.mark.parametrize("role", ["send", "recv"])
def test_a_pipe_has_a_deadline_at_both_ends(role: str) -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1", Bytes(4096)), deadline=0.1)
    with pytest.raises(WorkerLost) as e:
        if role == "send":
            sender.send(torch.ones(2000))
        else:
            receiver.recv(torch.ones(2000))
    assert e.value.device == ("cpu:1" if role == "send" else "cpu:0") and "0.1 s" in e.value.reason
    segment.close()


def test_abort_cuts_a_declared_delay_short() -> None:
    segment, sender, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1", delay=Seconds(30.0)))
    sender.send(torch.ones(2))
    assert not receiver.poll()  # sent, not yet due
    threading.Timer(0.1, lambda: segment.abort("cpu:0", "fenced")).start()
    with pytest.raises(WorkerLost, match="fenced"):
        receiver.recv(torch.ones(2))
    segment.close()


def test_a_signal_handler_runs_while_waiting() -> None:
    segment, _, receiver = pipe_ends(PipeSpec("cpu:0", "cpu:1"))

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, stop)
    try:
        threading.Timer(0.1, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            receiver.recv(torch.ones(2))
    finally:
        signal.signal(signal.SIGUSR1, before)
    segment.close()


def test_a_foreign_descriptor_is_refused(tmp_path: Path) -> None:
    for content in (b"", b"x" * 8192):
        file = tmp_path / "file"
        file.write_bytes(content)
        fd = os.open(file, os.O_RDWR)
        with pytest.raises(ValueError, match="no shared segment"):
            Segment.attach(fd)
        os.close(fd)
    segment = Segment.create(LAYOUT)
    with pytest.raises(ValueError, match="use the layout"):
        other = SegmentLayout.plan([GroupSpec(names(9), slot_bytes=Bytes(1 << 20))])
        ShmGroup(segment, other.groups[0], 0)
    ShmGroup(segment, LAYOUT.groups[0], 0)
    with pytest.raises(ValueError, match="already open"):
        ShmGroup(segment, LAYOUT.groups[0], 0)
    with pytest.raises(OSError):
        os.truncate(segment.path, 0)  # sealed: nobody can cut the memory away
    segment.close()


def test_nothing_is_left_open() -> None:
    def state() -> tuple[int, int]:
        maps = Path("/proc/self/maps").read_text()
        return len(list(Path("/proc/self/fd").iterdir())), maps.count("memfd:evener")

    before = state()
    for _ in range(20):
        segment = Segment.create(LAYOUT)
        assert os.fstat(segment.fd).st_nlink == 0  # no name anywhere: gone with the last process that maps it
        attached = Segment.attach(os.open(segment.path, os.O_RDWR))
        group = ShmGroup(attached, LAYOUT.groups[0], 0)
        attached.close()
        segment.close()
        segment.close()
        assert group.rank == 0
        group.close()
    assert state() == before


@pytest.mark.slow
def test_a_killed_peer_is_reported_by_the_hosts_abort() -> None:
    with Ranks(LAYOUT, "reduce_forever", 3, deadline=60) as ranks:
        assert [ranks.line(r) for r in range(3)] == [["going"]] * 3
        os.kill(ranks.pids[1], signal.SIGKILL)
        time.sleep(0.2)  # the others are asleep in their next sum
        aborted_at = time.monotonic()
        ranks.segment.abort("cpu:1", "killed")
        for r in (0, 2):
            word, at, device, *reason = ranks.line(r)
            assert (word, device, reason) == ("lost", "cpu:1", ["killed"])
            assert float(at) - aborted_at < 30  # not by the deadline, which is 60 s


@pytest.mark.slow
def test_a_stopped_peer_is_named_at_the_deadline() -> None:
    with Ranks(LAYOUT, "reduce_forever", 3, deadline=3) as ranks:
        assert [ranks.line(r) for r in range(3)] == [["going"]] * 3
        os.kill(ranks.pids[2], signal.SIGSTOP)
        for r in (0, 1):
            word, _, device, *reason = ranks.line(r)
            assert (word, device) == ("lost", "cpu:2") and "rank 2 had not arrived" in " ".join(reason)
        os.kill(ranks.pids[2], signal.SIGCONT)
        assert ranks.line(2)[0] == "lost"  # it learns that it was given up


@pytest.mark.slow
def test_a_host_that_dies_leaves_the_wait_to_the_deadline() -> None:
    with Ranks(LAYOUT, "recv", 1, deadline=1) as ranks:
        assert ranks.line(0) == ["going"]
        ranks.segment.close()
        word, _, device, *_reason = ranks.line(0)
        assert (word, device) == ("lost", "cpu:0")


@pytest.mark.slow
def test_four_processes_on_few_cores_get_the_same_bits() -> None:
    layout = SegmentLayout.plan([GroupSpec(names(4), slot_bytes=Bytes(8192)), GroupSpec(names(4))])
    with Ranks(layout, "sums", 4, deadline=60) as ranks:
        digests = [ranks.line(r) for r in range(4)]
    assert digests[0][0] == "digest" and all(d == digests[0] for d in digests)
