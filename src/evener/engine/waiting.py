"""The queue of one replica: sequences that hold nothing yet, in order of rank, and sums over them."""

import heapq
from collections.abc import Iterator

from evener.engine.sequence import Sequence, State


class WaitingQueue:
    """A heap by rank. Whoever ends while waiting is skipped when it comes up, and swept out before many pile up."""

    __slots__ = ("_heap", "caps", "pairs", "rows", "tokens")

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], Sequence]] = []
        self.rows = 0
        """Sequences that wait."""
        self.tokens = 0
        """Their known tokens."""
        self.pairs = 0
        """(query, key) pairs that computing these will cost."""
        self.caps = 0
        """Sum of their output caps."""

    def __iter__(self) -> Iterator[Sequence]:
        """Those that wait, in no order."""
        return (seq for _, seq in self._heap if seq.state is State.WAITING)

    def __len__(self) -> int:
        """Entries held, ended ones included."""
        return len(self._heap)

    def push(self, seq: Sequence) -> None:
        """Queue a sequence."""
        seq.state = State.WAITING
        heapq.heappush(self._heap, (seq.rank, seq))
        self._count(seq, 1)

    def first(self) -> Sequence | None:
        """The next in order, or None."""
        heap = self._heap
        while heap and heap[0][1].state is State.DONE:
            heapq.heappop(heap)
        return heap[0][1] if heap else None

    def pop(self) -> None:
        """Take out `first()`, which there must be."""
        self._count(heapq.heappop(self._heap)[1], -1)

    def take_last(self, max_tokens: int) -> Sequence | None:
        """Take out the last in order that needs at most `max_tokens` tokens of KV."""
        live = [e for e in self._heap if e[1].state is State.WAITING and e[1].most_tokens <= max_tokens]
        if not live:
            return None
        entry = max(live, key=lambda e: e[0])
        self._heap.remove(entry)
        heapq.heapify(self._heap)
        self._count(entry[1], -1)
        return entry[1]

    def end(self, seq: Sequence) -> None:
        """`seq`, which waits, ended."""
        self._count(seq, -1)
        seq.state = State.DONE
        if len(self._heap) > 2 * self.rows + 64:
            self._heap = [e for e in self._heap if e[1].state is State.WAITING]
            heapq.heapify(self._heap)

    def clear(self) -> None:
        """Forget everybody."""
        self._heap.clear()
        self.rows = self.tokens = self.pairs = self.caps = 0

    def _count(self, seq: Sequence, sign: int) -> None:
        self.rows += sign
        self.tokens += sign * seq.target
        self.pairs += sign * (seq.target * (seq.target + 1) // 2)
        self.caps += sign * seq.request.max_tokens
