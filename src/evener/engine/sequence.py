"""One request inside a replica, and the groups in which decoding sequences advance together."""

import heapq
from enum import Enum

from evener.engine.batch import TokenLogprobs
from evener.engine.kv import Key, chain_key
from evener.engine.request import Request
from evener.units import Nanoseconds


class State(Enum):
    """Where a sequence stands. `DRAINING`: its last token is in flight. `DONE`: nothing more will be emitted."""

    WAITING = "waiting"
    PREFILL = "prefill"
    DECODE = "decode"
    DRAINING = "draining"
    PREEMPTED = "preempted"
    DONE = "done"


class Sequence:
    """Mutable state of one request on one replica.

    `length` counts tokens that are known *or being sampled in flight*; `tokens` holds the known ones (None where
    only lengths are known). KV has been issued for the first `computed` of them while prefilling.
    """

    __slots__ = (
        "arrival", "blocks", "cached", "computed", "counted", "emitted", "first_answer", "group", "join_length",
        "join_step", "keys", "last_batch", "length", "order", "phase", "preempted", "prompt_logprobs", "published",
        "redo", "request", "slot", "state", "target", "tokens", "told",
    )  # fmt: skip

    def __init__(self, request: Request, order: int, arrival: Nanoseconds) -> None:
        self.request = request
        self.order = order
        self.arrival = arrival
        self.state = State.WAITING
        self.tokens: list[int] | None = None if request.prompt is None else list(request.prompt)
        self.length = request.prompt_len
        self.target = request.prompt_len
        """Known tokens to compute before the next one can be sampled (grows by replayed output)."""
        self.computed = 0
        self.cached = 0
        self.emitted = 0
        self.told = 0
        """Output tokens that the length estimator has heard of."""
        self.first_answer = True
        self.counted = False
        """Its prompt is among some replica's `prompt_tokens`."""
        self.slot = -1
        self.blocks: list[int] = []
        self.keys: list[Key] = []
        self.published = 0
        self.group: DecodeGroup | None = None
        self.join_step = 0
        self.join_length = 0
        self.phase = 0
        """Steps of its group, modulo the block size, at which it needs a new block."""
        self.last_batch = -1
        self.preempted = 0
        self.redo = 0
        """Tokens whose KV was computed once and lost: computing them again is a loss, not progress."""
        self.prompt_logprobs: list[TokenLogprobs] = []

    @property
    def rank(self) -> tuple[int, int]:
        """Smaller runs earlier and is preempted later."""
        return (self.request.priority, self.order)

    @property
    def most_tokens(self) -> int:
        """Tokens of KV that it needs at its cap."""
        return self.request.prompt_len + self.request.max_tokens

    @property
    def left(self) -> int:
        """Tokens still to prefill."""
        return self.target - self.computed

    @property
    def output_length(self) -> int:
        """Output tokens, known or in flight."""
        return self.current_length() - self.request.prompt_len

    def current_length(self) -> int:
        """`length`, advanced lazily while in a group."""
        if self.group is not None:
            return self.join_length + self.group.steps - self.join_step
        return self.length

    def whole_keys(self, block_tokens: int, limit: int) -> list[Key]:
        """Keys of the whole blocks within the first `limit` known tokens, computed once."""
        whole = limit // block_tokens
        if self.tokens is not None:
            while len(self.keys) < whole:
                k = len(self.keys)
                parent = self.keys[-1] if k else None
                self.keys.append(chain_key(parent, self.tokens[k * block_tokens : (k + 1) * block_tokens]))
        elif not self.keys and self.request.block_keys:
            self.keys = list(self.request.block_keys)
        return self.keys[:whole]


class DecodeGroup:
    """Sequences that decode in the same batches: one micro-batch of a pipeline.

    Every row gets one token per step, so everything about a row follows from the step count: it needs a KV block
    whenever the count comes round to its phase, and a heap says at which step it samples its last token. A step costs
    O(rows that need attention).
    """

    def __init__(self, group_id: int, block_tokens: int) -> None:
        self.group_id = group_id
        self.block_tokens = block_tokens
        self.steps = 0
        self.rows: dict[int, Sequence] = {}
        self.pending: list[Sequence] = []
        """Rows that join with the next batch of this group."""
        self.context = 0
        """Sum of current_length over rows: the keys that the next step reads."""
        self.in_flight = 0
        self.last_batch = -1
        self.joining: list[int] = []
        self.leaving: list[int] = []
        self._phases: list[dict[int, Sequence]] = [{} for _ in range(block_tokens)]
        """Phase -> slot -> row."""
        self._caps: list[tuple[int, int, Sequence]] = []
        """(step that samples the last token, order, row); an entry of a row that left since is void."""
        self._snapshot: tuple[Sequence, ...] | None = ()
        self._leads: list[tuple[int, int]] | None = []

    @property
    def size(self) -> int:
        """Rows of the next batch, joiners included."""
        return len(self.rows) + len(self.pending)

    def snapshot(self) -> tuple[Sequence, ...]:
        """The rows in order, as the workers see them; the same object until a row comes or goes."""
        if self._snapshot is None:
            self._snapshot = tuple(self.rows.values())
        return self._snapshot

    def leads(self) -> list[tuple[int, int]]:
        """By row: its output tokens minus the steps of the group, which stays the same, and its cap."""
        if self._leads is None:
            self._leads = [
                (s.join_length - s.join_step - s.request.prompt_len, s.request.max_tokens) for s in self.rows.values()
            ]
        return self._leads

    def join(self, seq: Sequence) -> None:
        """Append a row; its next position must have a block by the time of the step."""
        length = seq.length
        seq.group, seq.join_step, seq.join_length = self, self.steps, length
        self.rows[seq.slot] = seq
        self.context += length
        self._snapshot = self._leads = None
        self.joining.append(seq.slot)
        seq.phase = (self.steps + len(seq.blocks) * self.block_tokens - length + 1) % self.block_tokens
        self._phases[seq.phase][seq.slot] = seq
        to_last = seq.request.max_tokens - (length - seq.request.prompt_len) - 1
        heapq.heappush(self._caps, (self.steps + max(0, to_last), seq.order, seq))

    def remove(self, seq: Sequence) -> None:
        """Take a row out; workers hear of it with the next batch of this group."""
        seq.length = seq.current_length()
        seq.group = None
        seq.last_batch = max(seq.last_batch, self.last_batch)
        del self.rows[seq.slot]
        del self._phases[seq.phase][seq.slot]
        self.context -= seq.length
        self._snapshot = self._leads = None
        if seq.slot in self.joining:  # the workers never heard of it
            self.joining.remove(seq.slot)
        else:
            self.leaving.append(seq.slot)

    def short_rows(self) -> list[Sequence]:
        """Rows that need one more block before the next step."""
        phase = self._phases[self.steps % self.block_tokens]
        if not phase:
            return []
        size = self.block_tokens
        return [s for s in phase.values() if len(s.blocks) * size < s.join_length + self.steps - s.join_step]

    def last_tokens(self) -> list[Sequence]:
        """Rows that sample their last token with the next step, in order of arrival."""
        out: list[Sequence] = []
        caps, steps = self._caps, self.steps
        while caps and caps[0][0] <= steps:
            seq = heapq.heappop(caps)[2]
            if seq.group is self and seq.output_length + 1 >= seq.request.max_tokens and seq not in out:
                out.append(seq)
        return out

    def steps_to_cap(self) -> int:
        """Steps that can be issued before one samples the last token of a row (at least; rows must be there)."""
        return self._caps[0][0] - self.steps if self._caps else 0

    def blocks_of(self, steps: int) -> list[tuple[dict[int, Sequence], int]]:
        """What the next `steps` steps need: rows, and how many blocks each (none may hold more than it needs)."""
        size = self.block_tokens
        whole, rest = divmod(steps, size)
        out = []
        for k in range(size if whole else rest):
            rows = self._phases[(self.steps + k) % size]
            if rows:
                out.append((rows, whole + (k < rest)))
        return out

    def advance(self, batch_id: int, steps: int = 1) -> None:
        """Steps were issued, the last one as batch `batch_id`."""
        rows = len(self.rows)
        self.steps += steps
        self.context += rows * steps
        self.last_batch = batch_id
