"""The scheduler of one replica: queues, slots, blocks, batches in flight. Pure; `now` is given.

A sequence waits, prefills in chunks, then decodes in a group until its end is seen. Whatever ends (finished,
cancelled, preempted) keeps its slot and blocks until the last batch that names it is done.
"""

import heapq
from collections import deque

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.engine.batch import BatchResult
from evener.engine.builder import BatchBuilder
from evener.engine.events import Answer, Hold, IssueBatch
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


class InFlight:
    """A batch that was issued and is not done."""

    __slots__ = ("batch_id", "capped", "group", "late", "made_of", "rows", "shape", "step")

    def __init__(
        self, batch_id: int, group: DecodeGroup | None, rows: tuple[Sequence, ...], capped: list[Sequence],
        shape: BatchShape, made_of: MakeUp,
    ) -> None:  # fmt: skip
        self.batch_id = batch_id
        self.group = group
        self.step = group.steps if group is not None else 0
        self.rows = rows
        self.capped = capped
        self.shape = shape
        self.made_of = made_of
        self.late = 0
        """Decode rows that ended before this batch was done: their tokens are thrown away."""


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
        self._free_slots = list(range(config.max_num_seqs - 1, -1, -1))
        self._running = 0
        self._prefilling: list[Sequence] = []
        self._limbo: list[tuple[int, int, Sequence]] = []
        self._capped: list[Sequence] = []
        """Rows that sample their last token in the last step skipped."""
        self._next_batch = 0
        self._completed = -1

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
        return [s for s in self._prefilling if s.left > 0] if self._prefilling else []

    def waiting_rows(self) -> int:
        """Sequences that hold nothing yet."""
        return self.waiting.rows

    def takes_at_once(self) -> bool:
        """A slot is free beyond those that the waiting will get with the next batches."""
        return self.waiting.rows < len(self._free_slots)

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
        return self._next_batch

    def has_work(self) -> bool:
        """Some sequence has not ended."""
        return self.waiting.rows > 0 or self._running > 0

    def limbo_size(self) -> int:
        """Ended sequences whose last batch is still in flight."""
        return len(self._limbo)

    def prefill_tokens_left(self) -> int:
        """Prompt tokens waiting or partly done."""
        tokens = self.waiting.tokens
        for seq in self._prefilling:
            tokens += seq.target - seq.computed
        return tokens

    def prefill_tokens_ready(self) -> int:
        """Prompt tokens that could be computed now: partly done ones, and waiting ones for which there is room.

        Where slots are short, that is the first in the queue and, for each slot more, a prompt of mean length.
        """
        tokens = sum(s.left for s in self._prefilling)
        free, waiting = len(self._free_slots), self.waiting
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
        if not self._free_slots or not self.waiting.rows:
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
        seq.slot = self._free_slots.pop()
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
        self._prefilling.append(seq)
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
            if any(s.state is State.PREEMPTED for _, _, s in self._limbo):
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
        self._prefilling.remove(seq)
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
            if hold is None and any(s.state is State.PREEMPTED for _, _, s in self._limbo):
                hold = Hold(self.index, "preempting", None)
            return hold
        batch_id = self._next_batch
        self._next_batch += 1
        batch, rows = build.finish(batch_id, self.config.epoch)
        stepped = build.group if batch.step else None
        made_of = MakeUp(batch.shape, build.recompute_tokens)
        self.in_flight.append(InFlight(batch_id, stepped, rows, build.capped, batch.shape, made_of))
        return IssueBatch(self.index, batch)

    def steady_steps(self, most: int) -> int:
        """How many of the next batches (up to `most`) are plain decode steps of the present rows, as far as known here.

        In the last of them rows may sample their last token. Those in flight are plain steps already. True ends,
        arrivals and cancellations may end that earlier, and are for the caller to see. 0 where that cannot be said,
        though it may be so.
        """
        group = self.groups[0]
        if (
            len(self.groups) > 1 or not self.policy.repeats or len(self.in_flight) < self.config.depth
            or not group.rows or group.pending or group.leaving or self._prefilling or self._limbo
            or self.dropped_slots or self.table_changes
            # Whoever waits for blocks goes on waiting; if nobody does, the next batch composed will say so.
            or bool(self.waiting.rows and self._free_slots) is not self.short_of_kv
        ):  # fmt: skip
            return 0
        rows = group.snapshot()
        for record in self.in_flight:
            if record.rows is not rows or record.capped:
                return 0
        steps = min(most, group.steps_to_cap() + 1)
        available = self.pool.available
        if available < len(rows) * (1 + steps // self.config.block_tokens):
            while steps and sum(len(of) * count for of, count in group.blocks_of(steps)) > available:
                steps //= 2
        return steps

    def skip(self, steps: int) -> None:
        """Do at once what so many results and issues do, within `steady_steps`; `land` before anything else is done."""
        group = self.groups[0]
        for rows, count in group.blocks_of(steps):
            blocks = self.pool.allocate(len(rows) * count)
            assert blocks is not None, "a run of steps took more KV blocks than there were"
            if count == 1:
                for seq, block in zip(rows.values(), blocks, strict=True):
                    seq.blocks.append(block)
            else:
                for k, seq in enumerate(rows.values()):
                    seq.blocks += blocks[k * count : (k + 1) * count]
        before = min(steps, group.steps_to_cap())
        self._next_batch += steps
        self._completed += steps
        group.advance(self._next_batch - 1, before)
        if before < steps:  # the last one
            self._capped = group.last_tokens()
            group.advance(self._next_batch - 1)
            for seq in self._capped:
                group.remove(seq)
                seq.state = State.DRAINING

    def land(self) -> int:
        """After `skip`: the two steps issued last are in flight. The number of the first of them."""
        group = self.groups[0]
        rows = self.in_flight[-1].rows
        n, context = len(rows), group.context
        capped, self._capped = self._capped, []
        for seq in capped:
            context += seq.length
        self.in_flight.clear()
        for back in (2, 1):
            shape = BatchShape(decode_rows=n, decode_context=context - n * back, sampled_rows=n)
            record = InFlight(self._next_batch - back, group, rows, capped if back == 1 else [], shape, MakeUp(shape))
            record.step = group.steps - back + 1
            self.in_flight.append(record)
        self.late_rows = 0
        return self._next_batch - 2

    def batch_done(self, result: BatchResult) -> list[Answer]:
        """Account for the oldest batch in flight: new tokens, ends, freed blocks."""
        record = self.in_flight.popleft()
        assert record.batch_id == result.batch_id, f"batch {result.batch_id} done, expected {record.batch_id}"
        self._completed = record.batch_id
        self.late_rows = record.late
        if record.group is not None:
            record.group.in_flight -= 1
        if result.prompt_logprobs:
            for slot, entries in result.prompt_logprobs.items():
                if self.active[slot].first_answer:
                    self.active[slot].prompt_logprobs.extend(entries)
        answers = self._with_tokens(record, result) if result.tokens is not None else self._lengths_only(record, result)
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
        self._prefilling.clear()
        self._limbo.clear()
        self.in_flight.clear()
        self.table_changes.clear()
        self.dropped_slots.clear()
        self.pool = BlockPool(self.config.kv_blocks, self.policy.prefix_caching)
        self.groups = [DecodeGroup(g, self.config.block_tokens) for g in range(self.config.groups)]
        self._free_slots = list(range(self.config.max_num_seqs - 1, -1, -1))
        return sorted(left, key=lambda s: s.order)

    # ---- inside -----------------------------------------------------------------------------------------------

    def _with_tokens(self, record: InFlight, result: BatchResult) -> list[Answer]:
        assert result.tokens is not None
        answers = []
        for i, seq in enumerate(record.rows):
            if seq.state is State.DONE:
                continue
            token = result.tokens[i]
            request = seq.request
            emitted: list[int] = []
            finish: str | None = None
            if request.max_tokens == 0:
                finish = "length"
            elif token in request.stop_token_ids:
                finish = "stop"
            else:
                emitted = [token]
                assert seq.tokens is not None
                seq.tokens.append(token)
                known = len(seq.tokens)
                if (known - 1) % self.config.block_tokens == 0 and seq.state is State.DECODE:
                    self.publish(seq, known - 1)
                if known - request.prompt_len >= request.max_tokens:
                    finish = "length"
            logprobs = result.logprobs.get(i)
            answers.append(
                Answer(
                    request_id=request.request_id,
                    tokens=emitted,
                    count=len(emitted),
                    finish=finish,
                    stop_token=token if finish == "stop" else None,
                    logprobs=[logprobs] if logprobs is not None and emitted else None,
                    prompt_logprobs=seq.prompt_logprobs if seq.first_answer and seq.prompt_logprobs else None,
                    cached_tokens=seq.cached if seq.first_answer else 0,
                )
            )
            seq.first_answer = False
            seq.emitted += len(emitted)
            self.output_tokens += len(emitted)
            if finish is not None:
                self.end(seq)
        return answers

    def _lengths_only(self, record: InFlight, result: BatchResult) -> list[Answer]:
        answers: list[Answer] = []
        for slot, count in result.ended:
            seq = self.active[slot]
            if seq.state is not State.DONE:
                answers.append(self._counted(seq, count, "stop"))
        for seq in record.capped:
            if seq.state is not State.DONE:
                answers.append(self._counted(seq, seq.request.max_tokens, "length"))
        if not record.shape.chunks:
            return answers
        for seq in record.rows[record.shape.decode_rows :]:
            if seq.first_answer and seq.state is not State.DONE:
                answers.append(self._counted(seq, 1, None))
        return answers

    def _counted(self, seq: Sequence, total: int, finish: str | None) -> Answer:
        count = total - seq.emitted
        answer = Answer(
            request_id=seq.request.request_id,
            tokens=[],
            count=count,
            finish=finish,
            cached_tokens=seq.cached if seq.first_answer else 0,
        )
        seq.first_answer = False
        seq.emitted = total
        self.output_tokens += count
        if finish is not None:
            self.end(seq)
        return answer

    def _withdraw(self, seq: Sequence) -> None:
        """Take a sequence out of whatever would schedule it."""
        if seq.group is not None:
            seq.group.remove(seq)
            return
        if seq.state is State.PREFILL:
            self._prefilling.remove(seq)
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
        if seq.last_batch <= self._completed:
            self._release(seq)
        else:
            heapq.heappush(self._limbo, (seq.last_batch, seq.order, seq))

    def _release_completed(self) -> None:
        limbo = self._limbo
        while limbo and limbo[0][0] <= self._completed:
            self._release(heapq.heappop(limbo)[2])

    def _release(self, seq: Sequence) -> None:
        self.pool.release(seq.blocks)
        self.table_changes.pop(seq.slot, None)
        del self.active[seq.slot]
        self._free_slots.append(seq.slot)
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
