"""What the brain tells the ledger of itself: milestones of requests, batches issued and done, states of replicas. Pure.

A state is told when it changes only. Without a journal nothing is told, and nobody has to ask whether there is one.
"""

from evener.engine.batch import BatchResult
from evener.engine.events import Answer, Hold, IssueBatch
from evener.engine.replica import ReplicaEngine
from evener.engine.sequence import Sequence
from evener.ledger.spans import HoldKind, Journal, Milestone
from evener.units import Nanoseconds

HOLD_KIND = {
    "static_batch_fills": HoldKind.POLICY,
    "static_batch_runs": HoldKind.POLICY,
    "kv_blocks": HoldKind.KV,
    "preempting": HoldKind.KV,
}
"""What each reason to hold means to the ledger."""


class Telling:
    """The brain's voice. `live` is its table of requests: id -> (replica, sequence)."""

    def __init__(self, journal: Journal | None, live: dict[str, tuple[int, Sequence]]) -> None:
        self.journal = journal
        self._live = live
        self._states: dict[int, tuple[HoldKind, bool, bool]] = {}
        """Replica -> what was told of it last: why it holds, whether it has work, whether it is short of KV."""
        self._anybody_waits = False

    def milestone(self, request_id: str, now: Nanoseconds, what: Milestone, tokens: int | None = None) -> None:
        """What happened to a live request where it is now; `tokens` emitted, unless told otherwise."""
        if self.journal is not None:
            replica, seq = self._live[request_id]
            self.journal.request(request_id, replica, now, what, seq.emitted if tokens is None else tokens)

    def issued(self, replica: ReplicaEngine, command: IssueBatch, now: Nanoseconds) -> None:
        """A batch went to a replica: whom it preempted, what it is made of, whom it admits."""
        if self.journal is None:
            return
        for request_id in replica.newly_preempted:
            if request_id in self._live:
                emitted = self._live[request_id][1].emitted
                self.journal.request(request_id, replica.index, now, Milestone.PREEMPTED, emitted)
        replica.newly_preempted.clear()
        self.journal.issued(replica.index, command.batch.batch_id, now, replica.in_flight[-1].made_of)
        for new in command.batch.new:
            tokens = new.n_tokens - new.prompt_len
            self.journal.request(new.request_id, replica.index, now, Milestone.ADMITTED, tokens)

    def done(self, replica: ReplicaEngine, result: BatchResult, now: Nanoseconds) -> None:
        """The result of a batch is back."""
        if self.journal is not None:
            self.journal.done(replica.index, result.batch_id, now, replica.late_rows)

    def answered(self, answer: Answer, now: Nanoseconds) -> None:
        """Tokens go to a client: told of the first ones."""
        if self.journal is not None and answer.count and self._live[answer.request_id][1].emitted == answer.count:
            self.milestone(answer.request_id, now, Milestone.FIRST_TOKEN)

    def state(self, replica: ReplicaEngine, held: Hold | None, now: Nanoseconds) -> None:
        """Whether a replica has work, is short of KV, and why it issues nothing."""
        if self.journal is None:
            replica.newly_preempted.clear()  # nobody asks
            return
        kind = HOLD_KIND[held.reason] if held is not None else HoldKind.NONE
        state = (kind, replica.has_work(), replica.short_of_kv)
        if self._states.get(replica.index) != state:
            self._states[replica.index] = state
            self.journal.state(replica.index, now, *state)

    def down(self, index: int, reason: str, now: Nanoseconds) -> None:
        """A replica is lost; what it was before is forgotten, here as in the journal."""
        self._states.pop(index, None)
        if self.journal is not None:
            self.journal.down(index, now, reason)

    def waiting(self, anybody: bool, now: Nanoseconds) -> None:
        """Whether any request waits anywhere."""
        if self.journal is not None and anybody != self._anybody_waits:
            self._anybody_waits = anybody
            self.journal.waiting(now, anybody)
