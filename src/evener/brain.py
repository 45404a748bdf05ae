"""The brain: one pure state machine over all replicas, `step(event, now) -> commands`.

No torch, no I/O, no clock. It routes arrivals, lets each replica's scheduler compose batches, answers clients and
decides what a lost worker means. Live workers and the simulator are two bodies of this one brain.
"""

from collections.abc import Callable

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.engine.batch import BatchResult
from evener.engine.events import (
    Answer,
    Arrived,
    BatchDone,
    Cancelled,
    Command,
    Event,
    Hold,
    IssueBatch,
    Refuse,
    SetTimer,
    Shutdown,
    TimerFired,
    WorkerDown,
)
from evener.engine.policy import group_count, make_policy
from evener.engine.replica import ReplicaConfig, ReplicaEngine
from evener.engine.request import Request
from evener.engine.sequence import Sequence
from evener.engine.telling import Telling
from evener.ledger.spans import Journal, Milestone
from evener.router.candidates import CLOSELY, Candidates
from evener.router.census import Census
from evener.router.choose import Router, make_router
from evener.router.lengths import LengthEstimator
from evener.router.load import decode_left_at, load_of, rows_of
from evener.spec.plan import Plan
from evener.units import NS_PER_S, Nanoseconds

_TELL_EVERY = 16
"""Output tokens of a running request between two lessons for the length estimator."""


class BrainConfig(Struct, frozen=True):
    """Limits and policies of the whole service."""

    policy: str = "equal-time"
    router: str = "least-work"
    max_num_seqs: int = 64
    """Sequences that hold KV, per replica."""
    max_num_batched_tokens: int = 512
    max_queue: int = 1024
    """Requests that wait for a slot, over all replicas; one more is refused with 429."""
    block_tokens: int = 16
    static_batch: int = 32
    static_wait_ns: int = 100_000_000


class Brain:
    """Decides what runs next, where. Deterministic: the same events at the same times give the same commands."""

    def __init__(
        self,
        plan: Plan,
        kv_blocks: list[int],
        costs: CostModel,
        config: BrainConfig,
        journal: Journal | None = None,
    ) -> None:
        """`kv_blocks`: per replica, the fewest blocks that any of its shards can hold. `journal` hears of it all."""
        self.plan = plan
        self.journal = journal
        self.config = config
        self.costs = costs
        self.touch: Callable[[int, bool], None] | None = None
        """A body that runs ahead sets this; it is called before a replica is read (False) or changed (True)."""
        self.router: Router = make_router(config.router)
        self.lengths = LengthEstimator()
        self.replicas = [
            ReplicaEngine(r, self._replica_config(r, blocks), make_policy(config.policy), costs)
            for r, blocks in enumerate(kv_blocks)
        ]
        self.down: dict[int, str] = {}
        """Replica -> why it is down."""
        self._closed: str | None = None
        self._live: dict[str, tuple[int, Sequence]] = {}
        self._tell = Telling(journal, self._live)
        self._lessons = [0] * len(self.replicas)
        """By replica: steps at which the length estimator may hear of its rows again."""
        self._candidates = Candidates(self.replicas, costs) if len(self.replicas) > CLOSELY else None
        self._census = Census(self.replicas, self.down, self._candidates)
        self._order = 0
        self._timers: dict[int, int] = {}
        """Timer id -> replica."""
        self._next_timer = 0
        self._held: dict[int, Hold] = {}

    def _replica_config(self, replica: int, blocks: int) -> ReplicaConfig:
        stages = len(self.plan.replicas[replica].stages)
        shape = BatchShape(decode_rows=8, decode_context=8 * 512, sampled_rows=8)
        groups = group_count(stages, self.costs.latency_ns(replica, shape), self.costs.batch_ns(replica, shape))
        config = self.config
        return ReplicaConfig(
            kv_blocks=blocks,
            block_tokens=config.block_tokens,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            groups=groups,
            depth=groups if config.policy == "static" else groups + 1,
            static_batch=min(config.static_batch, config.max_num_seqs),
            static_wait_ns=config.static_wait_ns,
            epoch=self.plan.epoch,
        )

    # ---- the one entry point ----------------------------------------------------------------------------------

    def step(self, event: Event, now: Nanoseconds) -> list[Command]:
        """Consume one event and say what to do. `now` never decreases from call to call."""
        out: list[Command] = []
        if isinstance(event, BatchDone):
            self._batch_done(event.replica, event.result, now, out)
            self._pump(event.replica, now, out)
        elif isinstance(event, Arrived):
            self._arrived(event.request, now, out)
        elif isinstance(event, Cancelled):
            self._cancelled(event, now, out)
        elif isinstance(event, TimerFired):
            replica = self._timers.pop(event.timer_id, None)
            if replica is not None and replica not in self.down:
                self._change(replica)
                self._pump(replica, now, out)
        elif isinstance(event, WorkerDown):
            self._worker_down(event, now, out)
        else:
            self._shutdown(event, now, out)
        self._tell.waiting(self._census.all_waiting > 0, now)
        return out

    # ---- events -----------------------------------------------------------------------------------------------

    def _arrived(self, request: Request, now: Nanoseconds, out: list[Command]) -> None:
        if self._closed is not None:
            out.append(Refuse(request.request_id, "unavailable", self._closed))
            return
        alive = self._census.alive()
        if not alive:
            out.append(Refuse(request.request_id, "worker_lost", self.no_replica_reason()))
            return
        need = -(-(request.prompt_len + request.max_tokens) // self.config.block_tokens)
        room = self._census.most_room
        if need > room:
            tokens = room * self.config.block_tokens
            out.append(
                Refuse(
                    request.request_id,
                    "context_length_exceeded",
                    f"{request.prompt_len} prompt tokens and {request.max_tokens} output tokens need {need} KV blocks, "
                    f"a replica has {room} ({tokens} tokens); shorten the request or give the server more KV memory",
                )
            )
            return
        waiting = self._census.all_waiting
        if waiting >= self.config.max_queue and not any(r.takes_at_once() for r in alive):
            retry = max(1.0, min(self._seconds_of_queue(r) for r in alive))
            out.append(
                Refuse(
                    request.request_id,
                    "overloaded",
                    f"{waiting} requests are waiting, the limit is {self.config.max_queue}; retry in {retry:.0f} s",
                    retry,
                )
            )
            return
        self._order += 1
        seq = Sequence(request, self._order, now)
        replica = self._route(seq, need, alive)
        self._live[request.request_id] = (replica.index, seq)
        self._change(replica.index)
        replica.add(seq)
        self._census.note(replica)
        self._tell.milestone(request.request_id, now, Milestone.ARRIVED, request.prompt_len)
        self._pump(replica.index, now, out)

    def _route(self, seq: Sequence, need: int, alive: list[ReplicaEngine]) -> ReplicaEngine:
        """Where a sequence that needs so many KV blocks is queued; there must be a living replica that has them."""
        home = None
        among = alive
        if self._candidates is not None and self.router.predicts:
            home = next(iter(seq.whole_keys(self.config.block_tokens, seq.target - 1)), None)
            closest = [r for r in self._candidates.best(home) if r.index not in self.down]
            among = [r for r in closest if r.config.kv_blocks >= need] or alive
        if need > self._census.least_room and among is alive:
            among = [r for r in alive if r.config.kv_blocks >= need]
        if len(among) == 1:
            return among[0]
        if self.router.predicts:
            for replica in among:
                if self.touch is not None:
                    self.touch(replica.index, False)
                self._learn_from_running(replica)
            loads = [load_of(r, seq) for r in among]
        else:
            loads = [rows_of(r) for r in among]
        done = seq.target - seq.request.prompt_len
        left = self.lengths.expected_remaining(done, max(done, seq.request.max_tokens))
        chosen = self.replicas[self.router.choose(seq.target, left, loads, self.costs, self._decode_left)]
        if self._candidates is not None and home is not None:
            self._candidates.served(home, chosen.index)
        return chosen

    def _decode_left(self, index: int) -> float:
        return decode_left_at(self.replicas[index], self.lengths)

    def _learn_from_running(self, replica: ReplicaEngine) -> None:
        """Tell the length estimator how far running requests have come (censored), a few tokens at a time.

        Two tokens may be in flight and not yet known to have followed; the simulator knows no more either.
        """
        groups = replica.groups
        steps = groups[0].steps if len(groups) == 1 else sum([g.steps for g in groups])
        if steps < self._lessons[replica.index]:
            return
        self._lessons[replica.index] = steps + _TELL_EVERY // 4
        for group in groups:
            at = group.steps - 2
            for seq, (lead, _) in zip(group.rows.values(), group.leads(), strict=True):
                known = lead + at
                if known >= seq.told + _TELL_EVERY:
                    self.lengths.advance(seq.told, known)
                    seq.told = known

    def _batch_done(self, index: int, result: BatchResult, now: Nanoseconds, out: list[Command]) -> None:
        if index in self.down:
            return  # a result that was on its way when the replica was fenced; its sequences moved on
        replica = self.replicas[index]
        answers = replica.batch_done(result)
        self._tell.done(replica, result, now)
        for answer in answers:
            out.append(answer)
            self._tell.answered(answer, now)
            if answer.finish is not None:
                self._tell.milestone(answer.request_id, now, Milestone.ENDED)
                self._forget(answer.request_id, censored=answer.finish != "stop")

    def _cancelled(self, event: Cancelled, now: Nanoseconds, out: list[Command]) -> None:
        found = self._live.get(event.request_id)
        if found is None:
            return
        index, seq = found
        self._change(index)
        self.replicas[index].end(seq)
        self._tell.milestone(event.request_id, now, Milestone.ENDED)
        finish = "stop" if event.stopped else "cancelled"
        self._forget(event.request_id, censored=not event.stopped)
        out.append(Answer(event.request_id, [], 0, finish))
        self._pump(index, now, out)

    def _worker_down(self, event: WorkerDown, now: Nanoseconds, out: list[Command]) -> None:
        index = next((k for k, r in enumerate(self.plan.replicas) if event.device in r.devices()), None)
        if index is None or index in self.down:
            return
        self.down[index] = f"worker {event.device} lost: {event.reason}"
        self._held.pop(index, None)
        self._change(index)
        self._tell.down(index, self.down[index], now)
        if self._candidates is not None:
            self._candidates.lost(index)
        left = self.replicas[index].abandon()
        self._census.note(self.replicas[index])
        for seq in left:
            request = seq.request
            need = -(-(request.prompt_len + request.max_tokens) // self.config.block_tokens)
            if not self._census.alive() or self._census.most_room < need:
                self._tell.milestone(request.request_id, now, Milestone.ENDED)
                self._live.pop(request.request_id)
                out.append(Refuse(request.request_id, "worker_lost", self.no_replica_reason(index)))
                continue
            # What was emitted is forced on replay, never sampled again: the client sees no seam.
            target = self._route(seq, need, self._census.alive())
            self._change(target.index)
            target.requeue(seq)
            self._census.note(target)
            self._live[request.request_id] = (target.index, seq)
            self._tell.milestone(request.request_id, now, Milestone.MOVED)
        for replica in self.replicas:
            if replica.index not in self.down:
                self._pump(replica.index, now, out)

    def _shutdown(self, event: Shutdown, now: Nanoseconds, out: list[Command]) -> None:
        self._closed = event.reason
        for request_id, (index, seq) in list(self._live.items()):
            self._change(index)
            self.replicas[index].end(seq)
            self._census.note(self.replicas[index])
            self._tell.milestone(request_id, now, Milestone.ENDED)
            out.append(Refuse(request_id, "unavailable", event.reason))
        self._live.clear()

    # ---- what is running --------------------------------------------------------------------------------------

    def _pump(self, index: int, now: Nanoseconds, out: list[Command]) -> None:
        """Issue to a replica while its pipeline takes batches; then let idle replicas take over waiting requests."""
        self._issue(index, now, out)
        if len(self.replicas) > 1:
            for other in self._balance(now):
                self._issue(other, now, out)

    def _issue(self, index: int, now: Nanoseconds, out: list[Command]) -> None:
        replica = self.replicas[index]
        self._held.pop(index, None)
        while (issued := replica.next_batch(now)) is not None:
            out.append(issued)
            if isinstance(issued, IssueBatch):
                self._tell.issued(replica, issued, now)
                continue
            self._held[index] = issued
            if issued.until is not None:
                self._next_timer += 1
                self._timers[self._next_timer] = index
                out.append(SetTimer(self._next_timer, issued.until))
            break
        self._census.note(replica)
        self._tell.state(replica, self._held.get(index), now)

    def _balance(self, now: Nanoseconds) -> list[int]:
        """Move requests that wait at one replica to others that would start them at once."""
        moved: list[int] = []
        if self.router.moves_waiting and self._census.crowded and self._census.idle:
            for index in sorted(self._census.idle):
                idle = self.replicas[index]
                crowded = [self.replicas[k] for k in self._census.crowded]
                if index in self.down or not crowded:
                    continue
                source = max(crowded, key=lambda r: (r.waiting_rows(), -r.index))
                self._change(source.index)
                seq = source.take_waiting(idle.config.kv_blocks * idle.config.block_tokens)
                if seq is not None:
                    idle.add(seq)
                    self._census.note(source)
                    self._census.note(idle)
                    self._live[seq.request.request_id] = (idle.index, seq)
                    self._tell.milestone(seq.request.request_id, now, Milestone.MOVED)
                    moved.append(idle.index)
        return moved

    def _change(self, index: int) -> None:
        if self.touch is not None:
            self.touch(index, True)

    # ---- bookkeeping ------------------------------------------------------------------------------------------

    def _forget(self, request_id: str, censored: bool) -> None:
        _, seq = self._live.pop(request_id)
        self.lengths.advance(seq.told, seq.emitted)
        if not censored:
            self.lengths.end(max(seq.told, seq.emitted))

    def _seconds_of_queue(self, replica: ReplicaEngine) -> float:
        tokens = replica.prefill_tokens_left()
        shape = BatchShape(prefill_tokens=tokens, prefill_pairs=tokens * 256, chunks=1)
        return self.costs.batch_ns(replica.index, shape) / NS_PER_S

    # ---- for the bodies ---------------------------------------------------------------------------------------

    @property
    def unfinished(self) -> int:
        """Accepted requests that have not ended."""
        return len(self._live)

    def held(self, replica: int) -> Hold | None:
        """Why a replica with work is not issuing, if it is not."""
        return self._held.get(replica)

    def no_replica_reason(self, index: int | None = None) -> str:
        """What is down and how to go on."""
        which = [index] if index is not None else sorted(self.down)
        what = "; ".join(f"replica {k}: {self.down[k]}" for k in which)
        return f"{what}. No other replica can take it; restart the server, or leave the lost device out of the plan"
