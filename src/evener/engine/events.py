"""Events in, commands out: the whole vocabulary between the brain and its body, live or simulated.

Every record is frozen, typed and serialisable, so that a run can be recorded in consumption order with `now`
and replayed (law 4).
"""

from msgspec import Struct

from evener.engine.batch import Batch, BatchResult, TokenLogprobs
from evener.engine.request import Request
from evener.units import Nanoseconds

# ---- events -------------------------------------------------------------------------------------------------


class Arrived(Struct, frozen=True, tag=True):
    """A client's request, validated."""

    request: Request


class Cancelled(Struct, frozen=True, tag=True):
    """The client left, or (`stopped`) its stop string appeared. Unknown or finished ids are ignored."""

    request_id: str
    stopped: bool = False


class BatchDone(Struct, frozen=True, tag=True):
    """The last stage of a replica finished a batch."""

    replica: int
    result: BatchResult


class WorkerDown(Struct, frozen=True, tag=True):
    """A worker died, hung or was fenced; every worker of its replica is fenced with it."""

    device: str
    reason: str


class TimerFired(Struct, frozen=True, tag=True):
    """The time of an earlier SetTimer has come."""

    timer_id: int


class Shutdown(Struct, frozen=True, tag=True):
    """Accept nothing more; fail what is queued with `reason`, finish nothing."""

    reason: str


Event = Arrived | Cancelled | BatchDone | WorkerDown | TimerFired | Shutdown

# ---- commands -----------------------------------------------------------------------------------------------


class IssueBatch(Struct, frozen=True, tag=True):
    """Hand a batch to every worker of a replica."""

    replica: int
    batch: Batch


class Answer(Struct, frozen=True, tag=True):
    """Tokens for a client. `finish` is None while more may come, else `stop`, `length` or `cancelled`."""

    request_id: str
    tokens: list[int]
    """New output tokens (empty where only lengths are known, see `count`)."""
    count: int
    finish: str | None = None
    stop_token: int | None = None
    """The end-of-sequence token that finished it; not among `tokens`."""
    logprobs: list[TokenLogprobs] | None = None
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Sent once, with the first tokens; entry k belongs to prompt token k + 1."""
    cached_tokens: int = 0
    """Prompt tokens that were found in the prefix cache (on the first answer)."""


class Refuse(Struct, frozen=True, tag=True):
    """A request that ends without being served. `code` is the `code` of an `evener.errors` class."""

    request_id: str
    code: str
    message: str
    retry_after_s: float = 0.0


class SetTimer(Struct, frozen=True, tag=True):
    """Call back at `at` (absolute nanoseconds of the body's clock) with TimerFired(timer_id)."""

    timer_id: int
    at: Nanoseconds


class Hold(Struct, frozen=True, tag=True):
    """The brain could issue to this replica and does not (law 8)."""

    replica: int
    reason: str
    """One of `HOLD_REASONS`."""
    until: Nanoseconds | None
    """When it ends at the latest; None: with the next result of this replica."""


HOLD_REASONS = ("static_batch_fills", "static_batch_runs", "kv_blocks", "preempting")

Command = IssueBatch | Answer | Refuse | SetTimer | Hold
