"""What a simulation is given, and what becomes of each request. Times are absolute integer nanoseconds."""

from msgspec import Struct

from evener.engine.request import Request
from evener.units import Nanoseconds


class SimRequest(Struct, frozen=True):
    """A request, when it arrives, and the truth about it."""

    request: Request
    arrival: Nanoseconds
    output_len: int
    """The next token after this many is the end of sequence; `request.max_tokens` may end it earlier."""
    cancel_at: Nanoseconds | None = None


class Failure(Struct, frozen=True):
    """A device is lost at a given time."""

    device: str
    at: Nanoseconds


class SlowDown(Struct, frozen=True):
    """From `at` on, a device computes `factor` times as long as the cost model says (1: as it says)."""

    device: str
    at: Nanoseconds
    factor: float
    """1 or more."""

    def __post_init__(self) -> None:
        if not self.factor >= 1.0:
            raise ValueError(f"slow-down of {self.device} by {self.factor}: it must be 1 or more")


class Outcome(Struct):
    """What became of a request."""

    request_id: str
    arrival: Nanoseconds
    first_token: Nanoseconds | None = None
    ended: Nanoseconds | None = None
    tokens: int = 0
    finish: str = ""
    """`stop`, `length`, `cancelled`, or the error code of a refusal."""
    prompt_len: int = 0
