"""What is asked of all replicas at every event, kept as they change: who lives, who waits where, who is idle. Pure."""

from collections.abc import Collection, Sequence

from evener.engine.replica import ReplicaEngine
from evener.router.candidates import Candidates


class Census:
    """Of all replicas of a plan. `down` is the brain's own table of lost replicas."""

    def __init__(
        self, replicas: Sequence[ReplicaEngine], down: Collection[int], candidates: Candidates | None = None
    ) -> None:
        self._replicas, self._down, self._candidates = replicas, down, candidates
        self._alive: list[ReplicaEngine] = []
        self._alive_without = -1
        """How many were down when `_alive` was made."""
        self.most_room = self.least_room = 0
        """KV blocks of a living replica, as of the last call of `alive`."""
        self._waiting = [0] * len(replicas)
        self.all_waiting = 0
        """Requests that wait, over all replicas."""
        self.crowded: set[int] = set()
        """Replicas at which somebody waits."""
        self.idle = set(range(len(replicas)))
        """Replicas without a request."""

    def alive(self) -> list[ReplicaEngine]:
        """All that are not down."""
        if self._alive_without != len(self._down):
            self._alive_without = len(self._down)
            self._alive = [r for r in self._replicas if r.index not in self._down]
            rooms = [r.config.kv_blocks for r in self._alive]
            self.most_room, self.least_room = max(rooms, default=0), min(rooms, default=0)
        return self._alive

    def note(self, replica: ReplicaEngine) -> None:
        """A replica has changed."""
        index, waiting = replica.index, replica.waiting.rows
        before = self._waiting[index]
        if waiting != before:
            self._waiting[index] = waiting
            self.all_waiting += waiting - before
            if not waiting:
                self.crowded.discard(index)
            elif not before:
                self.crowded.add(index)
        if waiting or replica.running_rows():
            self.idle.discard(index)
        elif index not in self._down:
            self.idle.add(index)
        if self._candidates is not None and index not in self._down:
            self._candidates.note(replica)
