"""The scheduler of one replica: queues, slots, blocks, batches in flight. Pure; `now` is given.

A sequence waits, prefills in chunks, then decodes in a group until its end is seen. Whatever ends (finished,
cancelled, preempted) keeps its slot and blocks until the last batch that names it is done.
"""

import heapq
from collections import deque

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.engine.answers import answers_of
from evener.engine.batch import BatchResult
from evener.engine.builder import BatchBuilder
from evener.engine.events import Answer, Hold, IssueBatch
from evener.engine.in_flight import InFlight
from evener.engine.kv import BlockPool
from evener.engine.policy import Policy
from evener.engine.sequence import DecodeGroup, Sequence, State
from evener.engine.waiting import WaitingQueue
from evener.ledger.spans import MakeUp
from evener.units import Nanoseconds


class ReplicaConfig(Struct, frozen=True):
    """Limits of one replica."""

    kv_blocks: int
    block_tokens: int = 16
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 512
    groups: int = 1
    """Micro-batches that rotate through the pipeline."""
    depth: int = 2
    """Batches in flight, at most: one more than the pipeline needs hides the host."""
    static_batch: int = 32
    static_wait_ns: int = 100_000_000
    epoch: int = 0


class ReplicaEngine:
    """Decides what one replica runs next."""

    def __init__(self, index: int, config: ReplicaConfig, policy: Policy, costs: CostModel) -> None:
        self.index = index
        self.config = config
        self.policy = policy
        self.costs = costs
        self.pool = BlockPool(config.kv_blocks, policy.prefix_caching)
        self.groups = [DecodeGroup(g, config.block_tokens) for g in range(config.groups)]
        self.active: dict[int, Sequence] = {}
        """Slot -> sequence, from admission until its blocks are released."""
        self.table_changes: dict[int, list[int]] = {}
        self.dropped_slots: list[int] = []
        self.in_flight: deque[InFlight] = deque()
        self.static_size = 0
        self.static_longest = 0
        self.preemptions = 0
        self.prefix_hit_tokens = 0
        self.prompt_tokens = 0
        self.output_tokens = 0
        self.late_rows = 0
        """Of the batch that was done last: decode rows that had already ended (speculation)."""
        self.short_of_kv = False
        """A request waits for blocks (as the batch composed last found)."""
        self.newly_preempted: list[str] = []
        """Request ids since the brain last looked."""
        self.waiting = WaitingQueue()
        self.free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._running = 0
        self.prompts: list[Sequence] = []
        """Admitted, and not yet computed to the end."""
        self.limbo: list[tuple[int, int, Sequence]] = []
        """Ended, by the last batch that names them and their order."""
        self.capped: list[Sequence] = []
        """Rows that sample their last token in the last step skipped."""
        self.next_batch_id = 0
        self.completed_id = -1

    # ---- what policies ask ------------------------------------------------------------------------------------

    def next_group(self) -> DecodeGroup | None:
        """The group to step next: one without a batch in flight first, then the least recently issued.

        At most one successor of a group's running batch is queued.
        """
        groups = self.groups
        if len(groups) == 1:
            group = groups[0]
            return group if group.in_flight < 2 and group.size else None
        ready = [g for g in groups if g.size and g.in_flight < 2]
        return min(ready, key=lambda g: (g.in_flight, g.last_batch, g.group_id)) if ready else None

    def prefilling(self) -> list[Sequence]:
        """Admitted sequences with prompt left, in order."""
        return [s for s in self.prompts if s.left > 0] if self.prompts else []

    def waiting_rows(self) -> int:
        """Sequences that hold nothing yet."""
        return self.waiting.rows

    def takes_at_once(self) -> bool:
        """A slot is free beyond those that the waiting will get with the next batches."""
        return self.waiting.rows < len(self.free_slots)

    def oldest_waiting(self) -> Nanoseconds:
        """Arrival of the first in the queue; there must be one."""
        first = self.waiting.first()
        assert first is not None, "nobody waits"
        return first.arrival

    def running_rows(self) -> int:
        """Sequences that hold a slot and have not ended."""
        return self._running

    @property
    def batches_issued(self) -> int:
        """So far."""
        return self.next_batch_id

    def has_work(self) -> bool:
        """Some sequence has not ended."""
        return self.waiting.rows > 0 or self._running > 0

    def limbo_size(self) -> int:
        """Ended sequences whose last batch is still in flight."""
        return len(self.limbo)

    def prefill_tokens_left(self) -> int:
        """Prompt tokens waiting or partly done."""
        tokens = self.waiting.tokens
        for seq in self.prompts:
            tokens += seq.target - seq.computed
        return tokens

    def prefill_tokens_ready(self) -> int:
        """Prompt tokens that could be computed now: partly done ones, and waiting ones for which there is room.

        Where slots are short, that is the first in the queue and, for each slot more, a prompt of mean length.
        """
        tokens = sum(s.left for s in self.prompts)
        free, waiting = len(self.free_slots), self.waiting
        first = waiting.first() if free else None
        if first is None:
            return tokens
        queued = waiting.tokens
        if free < waiting.rows:
            queued = first.target + (queued - first.target) * (free - 1) // (waiting.rows - 1)
        return tokens + min(queued, self.pool.available * self.config.block_tokens)

    def group_ns(self, group: DecodeGroup) -> Nanoseconds:
        """Predicted time of the next step of a group."""
        rows = group.size
        context = group.context + sum(s.length for s in group.pending)
        return self.costs.batch_ns(self.index, BatchShape(decode_rows=rows, decode_context=context, sampled_rows=rows))

    def chunk_ns(self, tokens: int, rows: int) -> Nanoseconds:
        """Predicted time of a chunk at an empty context together with `rows` decoding rows of mean context."""
        total = sum(g.size for g in self.groups)
        context = sum(g.context for g in self.groups) * rows // total if total else 0
        shape = BatchShape(tokens, tokens * (tokens + 1) // 2, rows, context, rows, 0, 1)
        return self.costs.batch_ns(self.index, shape)

    def admit_next(self, build: BatchBuilder, reserve: bool = False) -> Sequence | Hold | None:
        """Give the first waiting sequence a slot and the blocks of its known tokens (of its cap: `reserve`).

        None if nobody waits or no slot is free; a Hold if blocks are short.
        """
        if not self.free_slots or not self.waiting.rows:
            return None
        seq = self.waiting.first()
        if seq is None:
            return None
        size = self.config.block_tokens
        hits: list[int] = []
        if seq.request.sampling.prompt_logprobs is None:
            # At least one token is computed, because its logits are needed.
            hits = self.pool.find(seq.whole_keys(size, seq.target - 1))
        tokens = seq.request.prompt_len + seq.request.max_tokens if reserve else seq.target
        need = -(-tokens // size) - len(hits)
        # Rows that decode will soon ask for blocks; leave them a few, or the newcomer is preempted at once.
        margin = 1 + self._running // 8 if self.active and not reserve else 0
        if need + margin + self.pool.cached_among(hits) > self.pool.available:
            self.short_of_kv = True
            return Hold(self.index, "kv_blocks", None)
        self.waiting.pop()
        self._running += 1
        self.pool.hold(hits)
        seq.blocks = hits + (self.pool.allocate(need) or [])
        seq.slot = self.free_slots.pop()
        seq.computed = len(hits) * size
        if seq.first_answer:
            seq.cached = seq.computed
        if not seq.counted:  # it may come again after a preemption, or from a lost replica
            seq.counted = True
            self.prompt_tokens += seq.request.prompt_len
        self.prefix_hit_tokens += seq.computed
        seq.published = len(hits)
        seq.state = State.PREFILL
        seq.last_batch = -1
        self.active[seq.slot] = seq
        self.table_changes[seq.slot] = list(seq.blocks)
        self.prompts.append(seq)
        build.admit(seq)
        return seq

    def extend(self, seq: Sequence, length: int) -> bool:
        """Make sure `seq` has a block for position `length - 1`, preempting the latest sequences if it must.

        False: not now; `seq` itself may have been preempted.
        """
        while len(seq.blocks) * self.config.block_tokens < length:
            got = self.pool.allocate(1)
            if got is not None:
                seq.blocks += got
                self.table_changes.setdefault(seq.slot, []).extend(got)
                continue
            if any(s.state is State.PREEMPTED for _, _, s in self.limbo):
                return False  # its blocks come back with the batches in flight
            victims = [s for s in self.active.values() if s.state in (State.PREFILL, State.DECODE)]
            victim = max(victims, key=lambda s: s.rank)
            self._preempt(victim)
            if victim is seq:
                return False
        return True

    def extend_all(self, rows: list[Sequence]) -> bool:
        """One more block for each of these rows, if there are as many; else False, and nothing changes."""
        blocks = self.pool.allocate(len(rows))
        if blocks is None:
            return False
        changes = self.table_changes
        for seq, block in zip(rows, blocks, strict=True):
            seq.blocks.append(block)
            if seq.slot in changes:
                changes[seq.slot].append(block)
            else:
                changes[seq.slot] = [block]
        return True

    def publish(self, seq: Sequence, computed: int) -> None:
        """Index the whole blocks among the first `computed` tokens, which must be known."""
        keys = seq.whole_keys(self.config.block_tokens, computed)
        for k in range(seq.published, len(keys)):
            self.pool.publish(seq.blocks[k], keys[k])
        seq.published = max(seq.published, len(keys))

    def prefilled(self, seq: Sequence, build: BatchBuilder) -> None:
        """The last chunk of `seq` was put into a batch: from here on it decodes."""
        self.prompts.remove(seq)
        seq.length = seq.target + 1
        if seq.length - seq.request.prompt_len >= seq.request.max_tokens:
            seq.state = State.DRAINING
            build.capped.append(seq)
        else:
            seq.state = State.DECODE
            self.policy.place(self).pending.append(seq)

    # ---- events -----------------------------------------------------------------------------------------------

    def add(self, seq: Sequence) -> None:
        """Queue a sequence."""
        self.waiting.push(seq)

    def take_waiting(self, max_tokens: int) -> Sequence | None:
        """Remove the last of the queue that needs at most `max_tokens` tokens of KV, to run it elsewhere."""
        return self.waiting.take_last(max_tokens)

    def next_batch(self, now: Nanoseconds) -> IssueBatch | Hold | None:
        """Compose and issue one batch if the pipeline takes one and something can run."""
        if len(self.in_flight) >= self.config.depth:
            return None
        build = BatchBuilder(self)
        self.short_of_kv = False
        hold = self.policy.compose(self, build, now)
        if not build:
            if hold is None and any(s.state is State.PREEMPTED for _, _, s in self.limbo):
                hold = Hold(self.index, "preempting", None)
            return hold
        batch_id = self.next_batch_id
        self.next_batch_id += 1
        batch, rows = build.finish(batch_id, self.config.epoch)
        stepped = build.group if batch.step else None
        made_of = MakeUp(batch.shape, build.recompute_tokens)
        self.in_flight.append(InFlight(batch_id, stepped, rows, build.capped, batch.shape, made_of))
        return IssueBatch(self.index, batch)

    def batch_done(self, result: BatchResult) -> list[Answer]:
        """Account for the oldest batch in flight: new tokens, ends, freed blocks."""
        record = self.in_flight.popleft()
        assert record.batch_id == result.batch_id, f"batch {result.batch_id} done, expected {record.batch_id}"
        self.completed_id = record.batch_id
        self.late_rows = record.late
        if record.group is not None:
            record.group.in_flight -= 1
        answers = answers_of(self, record, result)
        self._release_completed()
        return answers

    def end(self, seq: Sequence) -> None:
        """`seq` ended for whatever reason; nothing more will be emitted for it."""
        if seq.state is State.WAITING:
            self.waiting.end(seq)
            return
        preempted = seq.state is State.PREEMPTED
        group = seq.group
        if group is not None:
            for record in self.in_flight:
                record.late += record.group is group and record.step > seq.join_step
        self._withdraw(seq)
        seq.state = State.DONE
        if not preempted:  # else it is in limbo already
            self._running -= 1
            self._retire(seq)

    def abandon(self) -> list[Sequence]:
        """The workers are lost: forget everything in flight and return all unfinished sequences, in order."""
        left = [s for s in self.active.values() if s.state is not State.DONE]
        left += list(self.waiting)
        for seq in left:
            seq.length = seq.current_length()
            seq.group = None
        for record in self.in_flight:
            for seq in record.rows:
                seq.length -= seq.tokens is None  # a token that will never be known
        self.active.clear()
        self.waiting.clear()
        self._running = 0
        self.prompts.clear()
        self.limbo.clear()
        self.in_flight.clear()
        self.table_changes.clear()
        self.dropped_slots.clear()
        self.pool = BlockPool(self.config.kv_blocks, self.policy.prefix_caching)
        self.groups = [DecodeGroup(g, self.config.block_tokens) for g in range(self.config.groups)]
        self.free_slots = list(range(self.config.max_num_seqs - 1, -1, -1))
        return sorted(left, key=lambda s: s.order)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _withdraw(self, seq: Sequence) -> None:
        """Take a sequence out of whatever would schedule it."""
        if seq.group is not None:
            seq.group.remove(seq)
            return
        if seq.state is State.PREFILL:
            self.prompts.remove(seq)
        elif seq.state is State.DECODE:
            for group in self.groups:
                if seq in group.pending:
                    group.pending.remove(seq)

    def _preempt(self, seq: Sequence) -> None:
        self.preemptions += 1
        self._running -= 1
        self.newly_preempted.append(seq.request.request_id)
        seq.preempted += 1
        self._withdraw(seq)
        seq.state = State.PREEMPTED
        self._retire(seq)

    def _retire(self, seq: Sequence) -> None:
        if seq.last_batch <= self.completed_id:
            self._release(seq)
        else:
            heapq.heappush(self.limbo, (seq.last_batch, seq.order, seq))

    def _release_completed(self) -> None:
        limbo = self.limbo
        while limbo and limbo[0][0] <= self.completed_id:
            self._release(heapq.heappop(limbo)[2])

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        self.table_changes.pop(seq.slot, None)
        del self.active[seq.slot]
        self.free_slots.append(seq.slot)
        self.dropped_slots.append(seq.slot)
        seq.blocks, seq.slot, seq.published = [], -1, 0
        if seq.state is State.PREEMPTED:
            self.requeue(seq)

    def requeue(self, seq: Sequence) -> None:
        """Queue a sequence again; what it emitted is forced on replay, never sampled again."""
        computed = seq.length - 1 if seq.computed >= seq.target else seq.computed
        seq.redo = max(seq.redo, computed)
        seq.blocks, seq.slot, seq.published, seq.computed = [], -1, 0, 0
        seq.group = None
        seq.length = len(seq.tokens) if seq.tokens is not None else seq.length
        seq.target = seq.length
        if seq.first_answer:
            seq.prompt_logprobs = []
        self.add(seq)
