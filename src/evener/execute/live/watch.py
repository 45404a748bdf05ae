"""Notices that a worker is lost (dead, hung, or named by a peer), fences its whole replica, and says so once."""

import asyncio
import time
from collections.abc import Callable

from evener.execute.live.launch import WorkerProcess
from evener.execute.live.transport.segment import Segment
from evener.spec.plan import Plan
from evener.units import Seconds


class FailureWatch:
    """Watches the workers of one plan.

    `in_flight(replica)`: batches issued and not done. `down(device, reason)`: called once per lost replica, after its
    workers were killed and whoever waited for them was woken.
    """

    def __init__(
        self,
        plan: Plan,
        workers: dict[str, WorkerProcess],
        segments: list[Segment | None],
        deadline: Seconds,
        in_flight: Callable[[int], int],
        down: Callable[[str, str], None],
    ) -> None:
        self._plan = plan
        self._workers = workers
        self._segments = segments
        self._deadline = deadline
        self._in_flight = in_flight
        self._down = down
        self._fenced: set[int] = set()
        self._progress: dict[int, float] = {}
        """Replica -> last time it was seen to get on."""

    def gets_on(self, replica: int) -> None:
        """A result came from the replica, or it was idle and gets work just now."""
        self._progress[replica] = time.monotonic()

    def lost(self, device: str, reason: str) -> None:
        """Fence the replica of a lost worker, so that nobody waits for it. What is fenced already stays as it is."""
        device = device.split(", ")[0]  # a peer may name several; the first one stands for the replica
        index = next((k for k, r in enumerate(self._plan.replicas) if device in r.devices()), None)
        if index is None or index in self._fenced:
            return
        self._fenced.add(index)
        segment = self._segments[index]
        if segment is not None:
            segment.abort(device, reason)
        for name in self._plan.replicas[index].devices():
            self._workers[name].kill()
        if segment is not None:
            segment.close()
        self._down(device, reason)

    async def hung(self) -> None:
        """Until cancelled: a replica with batches in flight and no result for too long has a hung worker."""
        while True:
            await asyncio.sleep(min(1.0, self._deadline / 4))
            now = time.monotonic()
            for index, replica in enumerate(self._plan.replicas):
                late = now - self._progress.get(index, now)
                waiting = self._in_flight(index)
                # Peers of a hung rank give up first and know which one it is.
                if waiting and late > self._deadline * 1.5:
                    self.lost(replica.devices()[-1], f"no result for {late:.0f} s with {waiting} batches in flight")
