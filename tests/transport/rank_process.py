"""Ranks as processes: imports once, then forks. Arguments: descriptor, layout, scenario, ranks, deadline in seconds."""

import os
import signal
import sys
import time
import zlib

import msgspec
import torch

from evener.errors import WorkerLost
from evener.execute.live.transport.layout import SegmentLayout
from evener.execute.live.transport.shm import Segment, ShmGroup, ShmPipe
from evener.units import Seconds


def say(rank: int, *words: object) -> None:
    """One short write a line: lines of several ranks do not mix."""
    os.write(1, (" ".join(map(str, (rank, *words))) + "\n").encode())


def reduce_forever(group: ShmGroup) -> None:
    """All-reduces until something stops it; says when the first is through, and what ended it, when."""
    t = torch.full((50_000,), float(group.rank + 1))
    try:
        group.all_reduce(t)
        say(group.rank, "going")
        while True:
            group.all_reduce(t.fill_(1.0))
    except WorkerLost as e:
        say(group.rank, "lost", time.monotonic(), e.device, e.reason)


def sums(group: ShmGroup) -> None:
    """A fixed sequence of sums; says a digest of the bits."""
    generator = torch.Generator().manual_seed(group.rank)
    digest = 0
    for n in [1, 576, 5000, 40_000, 576, 100_003]:
        t = torch.randn(n, generator=generator)
        group.all_reduce(t)
        digest = zlib.crc32(t.numpy().tobytes(), digest)
    say(group.rank, "digest", digest)


def recv(pipe: ShmPipe) -> None:
    """Waits for a message that never comes."""
    say(0, "going")
    try:
        pipe.recv(torch.zeros(4))
    except WorkerLost as e:
        say(0, "lost", time.monotonic(), e.device, e.reason)


def run(fd: int, layout: SegmentLayout, scenario: str, rank: int, deadline: Seconds) -> None:
    say(rank, os.getpid())
    segment = Segment.attach(fd)
    if scenario == "recv":
        return recv(ShmPipe(segment, layout.pipes[0], "recv", deadline))
    # Processes start at different times: meet before short deadlines count.
    ShmGroup(segment, layout.groups[1], rank).all_reduce(torch.zeros(1))
    group = ShmGroup(segment, layout.groups[0], rank, deadline)
    {"reduce_forever": reduce_forever, "sums": sums}[scenario](group)


def main() -> None:
    torch.set_num_threads(1)
    fd, layout_json, scenario, ranks, deadline = sys.argv[1:]
    layout = msgspec.json.decode(layout_json, type=SegmentLayout)
    for rank in range(int(ranks)):
        if os.fork() == 0:
            try:
                run(int(fd), layout, scenario, rank, Seconds(float(deadline)))
            except BaseException as e:
                say(rank, "failed", repr(e))
            os._exit(0)
    os.close(int(fd))
    signal.pause()  # the test ends us


if __name__ == "__main__":
    main()
