"""Runs ranks for the transport tests: threads on one segment, or processes that attach to it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec

from evener.execute.live.transport.layout import GroupSpec, PipeSpec, SegmentLayout
from evener.execute.live.transport.shm import SPIN, Segment, ShmGroup, ShmPipe
from evener.units import Seconds

WORKER = Path(__file__).with_name("rank_process.py")


def names(n: int) -> tuple[str, ...]:
    return tuple(f"cpu:{i}" for i in range(n))


def in_threads(n: int, body: Callable[[int], Any]) -> list[Any]:
    """body(rank) in n threads; their results in rank order. An exception in any is raised here."""
    with ThreadPoolExecutor(n) as pool:
        return [f.result() for f in [pool.submit(body, rank) for rank in range(n)]]


def with_group(spec: GroupSpec, body: Callable[[ShmGroup], Any], spin: float = SPIN) -> list[Any]:
    """body(group) on every rank of a fresh group."""
    layout = SegmentLayout.plan([spec])
    segment = Segment.create(layout)
    try:
        return in_threads(
            len(spec.devices),
            lambda rank: body(ShmGroup(segment, layout.groups[0], rank, Seconds(20.0), Seconds(spin))),
        )
    finally:
        segment.close()


def pipe_ends(spec: PipeSpec, deadline: float = 20.0) -> tuple[Segment, ShmPipe, ShmPipe]:
    """A fresh segment with one pipe, and both ends of it."""
    layout = SegmentLayout.plan([], [spec])
    segment = Segment.create(layout)
    region = layout.pipes[0]
    return (
        segment,
        ShmPipe(segment, region, "send", Seconds(deadline)),
        ShmPipe(segment, region, "recv", Seconds(deadline)),
    )


class Ranks:
    """Rank processes of one segment, each running a scenario of rank_process.py and reporting by lines."""

    def __init__(self, layout: SegmentLayout, scenario: str, n: int, deadline: float) -> None:
        self.segment = Segment.create(layout)
        plan = msgspec.json.encode(layout).decode()
        self.parent = subprocess.Popen(
            [sys.executable, str(WORKER), str(self.segment.fd), plan, scenario, str(n), str(deadline)],
            pass_fds=[self.segment.fd],
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines: list[list[list[str]]] = [[] for _ in range(n)]
        self.pids: list[int] = []
        self.pids = [int(self.line(rank)[0]) for rank in range(n)]

    def line(self, rank: int) -> list[str]:
        """The next line of a rank, split into words; blocks until there is one."""
        assert self.parent.stdout is not None
        while not self._lines[rank]:
            speaker, *words = self.parent.stdout.readline().split()
            self._lines[int(speaker)].append(words)
        return self._lines[rank].pop(0)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        # The parent never reaps its children, so these numbers are still theirs.
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)
        self.parent.kill()
        self.parent.communicate()
        self.segment.close()
