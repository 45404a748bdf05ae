"""What goes into the next batch: one small contract, three policies.

`static` is the pre-training habit, `fcfs` what today's engines do, `equal-time` Evener's own.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Protocol

from evener.cost.base import BatchShape
from evener.engine.builder import BatchBuilder
from evener.engine.events import Hold
from evener.engine.sequence import DecodeGroup, Sequence
from evener.errors import InvalidInput
from evener.units import Nanoseconds

if TYPE_CHECKING:
    from evener.engine.replica import ReplicaEngine


class Policy(Protocol):
    """Composes batches. Must be deterministic and may read only the replica and `now`."""

    name: str
    prefix_caching: bool
    repeats: bool
    """While nobody comes, goes or can be admitted, each batch is one more step of the same rows and nothing else."""

    def compose(self, replica: ReplicaEngine, build: BatchBuilder, now: Nanoseconds) -> Hold | None:
        """Fill `build`; leave it empty when nothing can run, saying why with a Hold if work waits."""
        ...

    def place(self, replica: ReplicaEngine) -> DecodeGroup:
        """The group that a sequence joins when its prompt is done."""
        ...


def group_count(stages: int, trip_ns: float, slowest_ns: float) -> int:
    """Micro-batches that rotate through a pipeline: as many as the round trip takes bottleneck times."""
    # A quarter is forgiven: a rounding of the prediction is no stage.
    return 1 if stages == 1 else min(stages, max(2, math.ceil(trip_ns / max(1, slowest_ns) - 0.25)))


def fewest_rows(replica: ReplicaEngine) -> DecodeGroup:
    """The group with the fewest rows, the first among equals."""
    return min(replica.groups, key=lambda g: (g.size, g.group_id))


class Fcfs:
    """First come, first served under a token budget: decode rows first, then prompt chunks (vLLM's scheduler)."""

    name = "fcfs"
    prefix_caching = True
    repeats = True

    def compose(self, replica: ReplicaEngine, build: BatchBuilder, now: Nanoseconds) -> Hold | None:
        """Decode everything that can, then fill the token budget with prompts in order."""
        group = replica.next_group()
        if group is not None:
            build.step(group)
        budget = replica.config.max_num_batched_tokens - build.decode_rows
        for seq in replica.prefilling():
            if budget <= 0:
                return None
            count = min(seq.left, budget)
            build.chunk(seq, count)
            budget -= count
        while budget > 0:
            seq_or_hold = replica.admit_next(build)
            if seq_or_hold is None or isinstance(seq_or_hold, Hold):
                return seq_or_hold
            count = min(seq_or_hold.left, budget)
            build.chunk(seq_or_hold, count)
            budget -= count
        return None

    def place(self, replica: ReplicaEngine) -> DecodeGroup:
        """Spread rows over the groups by number."""
        return fewest_rows(replica)


class EqualTime:
    """Micro-batches packed to equal predicted *time*, so that no stage waits for a longer batch in front of it.

    The time is that of a prompt chunk of `max_num_batched_tokens` tokens at an empty context. In a pipeline a batch
    that is longer than its neighbours empties the stages behind it as it comes and those before it as it goes. So there
    a chunk beside decoding rows is as small as is still efficient, and without such rows small beside all that waits. A
    chunk deep inside a long prompt attends to more keys and is cut shorter; decode rows move between groups until these
    take equally long.
    """

    name = "equal-time"
    prefix_caching = True
    repeats = True
    smallest_chunk = 64
    """Tokens; below this the GEMMs lose more than the pipeline gains."""
    parts = 8
    """Chunks, at least, that each micro-batch of a pipeline makes of the prompts that could run, if no row decodes."""
    grain_loss = 0.1
    """What a token of a small chunk may cost more, relative to one of a full chunk."""

    def compose(self, replica: ReplicaEngine, build: BatchBuilder, now: Nanoseconds) -> Hold | None:
        """Step a group, then add chunks until the predicted time is reached."""
        group = replica.next_group()
        if group is not None:
            self._rebalance(replica, group)
            build.step(group)
        if not replica.prompts and not replica.waiting.rows:
            return None
        target = self._target(replica)
        for seq in replica.prefilling():
            count = self._fit(replica, build, seq.computed, seq.left, target)
            if count == 0:
                return None
            build.chunk(seq, count)
        while build.prefill_tokens + build.decode_rows < replica.config.max_num_batched_tokens:
            if self._fit(replica, build, 0, self.smallest_chunk, target) == 0:
                return None
            got = replica.admit_next(build)
            if got is None or isinstance(got, Hold):
                return got
            count = self._fit(replica, build, got.computed, got.left, target)
            build.chunk(got, max(count, min(got.left, 1)))
        return None

    def place(self, replica: ReplicaEngine) -> DecodeGroup:
        """The group whose next step is predicted to be the shortest."""
        return min(replica.groups, key=lambda g: (replica.group_ns(g), g.group_id))

    def _rebalance(self, replica: ReplicaEngine, group: DecodeGroup) -> None:
        # One row per step is enough: groups drift apart slowly, and a move may cost one pipeline slot.
        if len(replica.groups) == 1 or not group.rows:
            return
        lightest = min(replica.groups, key=lambda g: (g.size, g.group_id))
        if group.size - lightest.size >= 2:
            seq = next(reversed(group.rows.values()))
            if seq.slot not in group.joining:
                group.remove(seq)
                lightest.pending.append(seq)

    def _target(self, replica: ReplicaEngine) -> Nanoseconds:
        full = replica.config.max_num_batched_tokens
        slots = len(replica.groups)
        if slots == 1:
            return replica.chunk_ns(full, 0)
        # A chunk rides on a decode step: leave room for the rows that share its batch.
        rows = max(g.size for g in replica.groups)
        part = 0 if rows else -(-replica.prefill_tokens_ready() // (slots * self.parts))
        if part < full:
            full = max(part, self._grain(replica, full))
        return replica.chunk_ns(full, rows)

    def _grain(self, replica: ReplicaEngine, full: int) -> int:
        """The smallest chunk whose tokens cost, if it runs by itself, little more than those of a full one."""

        def cost(tokens: int) -> float:
            # As many keys for each token, however long the chunk: cutting a prompt takes none away.
            shape = BatchShape(prefill_tokens=tokens, prefill_pairs=tokens * (full + 1) // 2, chunks=1)
            return replica.costs.batch_ns(replica.index, shape) / tokens

        most = (1 + self.grain_loss) * cost(full)
        chunk = self.smallest_chunk
        while chunk < full and cost(chunk) > most:
            chunk *= 2
        return min(chunk, full)

    def _fit(self, replica: ReplicaEngine, build: BatchBuilder, start: int, left: int, target: Nanoseconds) -> int:
        """The most tokens of a chunk at `start` that keep the batch within `target` and the token budget."""
        room = replica.config.max_num_batched_tokens - build.decode_rows - build.prefill_tokens
        high = min(left, room)
        if high <= 0:
            return 0

        def fits(count: int) -> bool:
            # However long the decode rows take, prompts advance: nobody starves.
            if build.prefill_tokens + count <= self.smallest_chunk:
                return True
            return replica.costs.batch_ns(replica.index, build.shape_with(start, count, count == left)) <= target

        if fits(high):
            return high
        if not fits(1):
            return 0
        # So much always fits.
        low = max(1, min(high, self.smallest_chunk - build.prefill_tokens))
        while high - low > max(1, low // 16):
            mid = (low + high) // 2
            low, high = (mid, high) if fits(mid) else (low, mid)
        return low


class Static:
    """The pre-training habit: gather a batch, pad it to its longest prompt, run it until its longest answer is done.

    Nothing joins a running batch, finished rows go on as padding, and room for the longest possible answer is
    taken at the start. It is a baseline, not advice.
    """

    name = "static"
    prefix_caching = False
    repeats = False

    def compose(self, replica: ReplicaEngine, build: BatchBuilder, now: Nanoseconds) -> Hold | None:
        """Run the present batch, or gather the next one."""
        running = replica.running_rows() > 0 or bool(replica.limbo_size())
        prefilling = replica.prefilling()
        if not running and not prefilling:
            if replica.waiting_rows() == 0:
                return None
            oldest = replica.oldest_waiting()
            until = Nanoseconds(oldest + replica.config.static_wait_ns)
            if replica.waiting_rows() < replica.config.static_batch and now < until:
                return Hold(replica.index, "static_batch_fills", until)
            replica.static_size = 0
            while replica.static_size < replica.config.static_batch:
                got = replica.admit_next(build, reserve=True)
                if got is None or isinstance(got, Hold):
                    break
                replica.static_size += 1
            prefilling = replica.prefilling()
            replica.static_longest = max((s.target for s in prefilling), default=0)
        if prefilling:
            self._prefill(replica, build, prefilling)
            return None
        group = replica.next_group()
        if group is None:
            return Hold(replica.index, "static_batch_runs", None) if replica.waiting_rows() else None
        build.step(group)
        share = -(-replica.static_size // len(replica.groups))
        build.pad_tokens = max(0, share - build.decode_rows)
        return None

    def _prefill(self, replica: ReplicaEngine, build: BatchBuilder, prefilling: list[Sequence]) -> None:
        """Whole prompts, each padded to the longest of the static batch, as many as the token budget takes."""
        budget = replica.config.max_num_batched_tokens
        if replica.static_longest > budget:  # in pieces, one prompt at a time
            seq = prefilling[0]
            count = min(seq.left, budget)
            if count == seq.left:
                build.pad_tokens += min(budget - count, replica.static_longest - seq.target)
            build.chunk(seq, count)
            return
        rows = budget // replica.static_longest
        rows = min(rows, -(-replica.static_size // len(replica.groups)))
        for seq in prefilling[:rows]:
            build.pad_tokens += replica.static_longest - seq.left
            build.chunk(seq, seq.left)

    def place(self, replica: ReplicaEngine) -> DecodeGroup:
        """Equal numbers of rows per micro-batch."""
        return fewest_rows(replica)


POLICIES: dict[str, type[Fcfs] | type[EqualTime] | type[Static]] = {p.name: p for p in (EqualTime, Fcfs, Static)}


def make_policy(name: str) -> Policy:
    """The policy of that name. Raises InvalidInput naming the ones there are."""
    if name not in POLICIES:
        raise InvalidInput(f"policy {name!r} is unknown; choose one of {', '.join(POLICIES)}")
    return POLICIES[name]()
