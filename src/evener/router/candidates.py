"""Which replicas to look at closely when there are very many.

A prediction for every replica would cost more than the decision is worth. Of more than `CLOSELY` replicas, a cheap
key says who has least to do (predicted nanoseconds, from counts that cost nothing to keep), and the router predicts for
the `CLOSELY` best of them, and for the replica that served the same beginning of a prompt last (its cache may hold it).
With `CLOSELY` replicas or fewer, all are looked at.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from evener.cost.base import BatchShape, CostModel
from evener.engine.kv import Key
from evener.engine.replica import ReplicaEngine

CLOSELY = 8
_HOMES = 65_536
"""Beginnings of prompts that are remembered."""
_CHUNK = 512
_ROWS, _CONTEXT, _STEPS = 32, 512, 128
"""A batch, and an answer, that the cheap key is made for."""


class Candidates:
    """Keys of all replicas, and the least of them."""

    def __init__(self, replicas: list[ReplicaEngine], costs: CostModel) -> None:
        self.replicas = replicas
        self._keys = [-1] * len(replicas)
        self._heap: list[tuple[int, int]] = []
        """(key, replica); void where the key has changed since."""
        self._homes: OrderedDict[Key, int] = OrderedDict()
        self._rates = [_rates(costs, r.index) for r in replicas]
        for replica in replicas:
            self.note(replica)

    def note(self, replica: ReplicaEngine) -> None:
        """Something was queued, admitted, computed or ended there."""
        per_token, per_step, per_row = self._rates[replica.index]
        waiting = replica.waiting.rows
        rows = waiting + replica.running_rows()
        slots = replica.config.max_num_seqs
        late = max(0, rows - slots) * _STEPS * per_step // slots
        key = per_token * replica.prefill_tokens_left() + _STEPS * (per_step + per_row * rows) + late
        if key != self._keys[replica.index]:
            self._keys[replica.index] = key
            heapq.heappush(self._heap, (key, replica.index))
            if len(self._heap) > 8 * len(self.replicas) + 64:
                self._heap = [(k, r) for r, k in enumerate(self._keys) if k >= 0]  # not the lost ones
                heapq.heapify(self._heap)

    def best(self, home: Key | None) -> Iterator[ReplicaEngine]:
        """The `CLOSELY` replicas with the least key, the lowest number on ties, and where `home` was served last."""
        heap, keys = self._heap, self._keys
        found: list[tuple[int, int]] = []
        while heap and len(found) < CLOSELY:
            entry = heapq.heappop(heap)
            if keys[entry[1]] == entry[0] and entry not in found:
                found.append(entry)
        for entry in found:
            heapq.heappush(heap, entry)
            yield self.replicas[entry[1]]
        last = self._homes.get(home) if home is not None else None
        if last is not None and all(last != r for _, r in found):
            yield self.replicas[last]

    def served(self, home: Key, replica: int) -> None:
        """A prompt that begins with this block went there."""
        self._homes[home] = replica
        self._homes.move_to_end(home)
        if len(self._homes) > _HOMES:
            self._homes.popitem(last=False)

    def lost(self, index: int) -> None:
        """Never to be looked at again."""
        self._keys[index] = -1


def _rates(costs: CostModel, replica: int) -> tuple[int, int, int]:
    """Nanoseconds per prompt token, per step, and more per row in it."""
    chunk = BatchShape(_CHUNK, _CHUNK * (_CHUNK + 1) // 2, chunks=1)
    one, many = (
        costs.latency_ns(replica, BatchShape(decode_rows=n, decode_context=n * _CONTEXT, sampled_rows=n))
        for n in (1, _ROWS + 1)
    )
    return costs.batch_ns(replica, chunk) // _CHUNK, one, (many - one) // _ROWS
