"""What a run is, and what it had to serve: read off the events that its brain consumed and the commands it gave.

The same log reads a recording and listens to a running engine. Pure.
"""

from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple

from msgspec import Struct

from evener.brain import BrainConfig
from evener.engine.events import Answer, Arrived, Cancelled, Command, Event, Refuse, WorkerDown
from evener.engine.request import Request
from evener.ledger.finding import Hints, hints_of
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import Nanoseconds


class Header(Struct, frozen=True, array_like=True, tag="header"):
    """What ran: the first record of a recording."""

    format: int
    evener: str
    """Version that wrote it."""
    started: Nanoseconds
    """Of the ledger: loading counts from here. The clock of all times of the run (the host's monotonic clock)."""
    model: ModelSpec
    model_name: str
    plan: Plan
    cluster: Cluster
    kv_blocks: list[int]
    """Per replica."""
    brain: BrainConfig
    costs: dict[str, Any]
    """Identity of the cost model and what it was made from (see `evener.api`); the replayed one must be equal."""

    @property
    def kv_dtype(self) -> str:
        """Of the KV cache."""
        said: str = self.costs["kv_dtype"]
        return said

    @property
    def hints(self) -> Hints:
        """What a verdict about the run may name."""
        return hints_of(self.model, self.kv_dtype, self.brain.max_num_seqs)


class Served(Struct):
    """One request of a run. Times are absolute nanoseconds."""

    request: Request
    arrived: Nanoseconds
    first: Nanoseconds | None = None
    """When its first tokens left the engine."""
    tokens: int = 0
    """Output tokens."""
    ended: Nanoseconds | None = None
    finish: str = "unfinished"
    """`stop`, `length`, `cancelled`, or the code of a refusal."""
    cancelled: Nanoseconds | None = None
    """When the client left."""
    cached: int = 0
    """Prompt tokens that were found in the prefix cache."""


class LostWorker(NamedTuple):
    """A device that was lost."""

    device: str
    at: Nanoseconds


class ServedLog:
    """The newest requests of a run, in order of arrival."""

    def __init__(self, header: Header, keep: int | None = None) -> None:
        """`keep`: so many requests at most, and of each the lengths alone; None: all of them, as they came."""
        self.header = header
        self.keep = keep
        self.requests: deque[Served] = deque(maxlen=keep)
        self.lost: list[LostWorker] = []
        self.complete_since = header.started
        """Every request that ended from here on is kept, but for one that outlives `keep` others."""
        self.now = header.started
        """Of the last step."""
        self._live: dict[str, Served] = {}
        self._count = 0

    def step(self, now: Nanoseconds, event: Event, commands: Sequence[Command]) -> None:
        """The brain consumed an event and gave these commands."""
        self.now = now
        if isinstance(event, Arrived):
            self._arrived(event.request, now)
        elif isinstance(event, Cancelled):
            one = self._live.get(event.request_id)
            if one is not None and not event.stopped:
                one.cancelled = now
        elif isinstance(event, WorkerDown):
            self.lost.append(LostWorker(event.device, now))
        for command in commands:
            if isinstance(command, Answer):
                self._answered(command, now)
            elif isinstance(command, Refuse) and (one := self._live.pop(command.request_id, None)) is not None:
                one.ended, one.finish = now, command.code

    def since(self, at: Nanoseconds) -> tuple[list[Served], list[Served]]:
        """The requests that ended from `at` on; and what ran beside them, but ended before or runs still."""
        ended = [r for r in self.requests if r.ended is not None and r.ended >= at]
        if not ended:
            return [], [r for r in self.requests if r.ended is None]
        first, last = ended[0].arrived, max(r.ended for r in ended if r.ended is not None)
        return ended, [r for r in self.requests if r.arrived < last and (r.ended is None or first < r.ended < at)]

    def _arrived(self, request: Request, now: Nanoseconds) -> None:
        if self.keep is not None and len(self.requests) == self.keep:
            goes = self.requests[0].ended
            self.complete_since = max(self.complete_since, Nanoseconds(goes + 1 if goes is not None else now))
        self._count += 1
        kept = request if self.keep is None else lengths_of(request, f"r{self._count}")
        self._live[request.request_id] = one = Served(kept, now)
        self.requests.append(one)

    def _answered(self, answer: Answer, now: Nanoseconds) -> None:
        one = self._live.get(answer.request_id)
        if one is None:
            return
        if answer.count:
            if one.first is None:
                one.first = now
            one.tokens += answer.count
        one.cached = max(one.cached, answer.cached_tokens)
        if answer.finish is not None:
            one.ended, one.finish = now, answer.finish
            del self._live[answer.request_id]


def lengths_of(request: Request, name: str) -> Request:
    """The same request under another name, and without what the client said."""
    return Request(name, request.prompt_len, request.max_tokens, priority=request.priority)
