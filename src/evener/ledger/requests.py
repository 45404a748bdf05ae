"""Where a request's latency went: its phases, and what its replica's devices did meanwhile."""

from msgspec import Struct

from evener.ledger.spans import Milestone
from evener.units import Nanoseconds


class Phase(Struct, frozen=True):
    """One part of a request's life at one replica."""

    name: str
    """`queued`, `prefill`, `decode`, or `requeued` (after a preemption or a move)."""
    replica: int
    began: Nanoseconds
    ended: Nanoseconds
    seconds: float
    causes: dict[str, float]
    """How the replica's devices spent this time, on average over them: label -> seconds, zeros left out. They sum to
    `seconds` as far as the ledger knows this time."""


class RequestAccount(Struct, frozen=True):
    """One request from its arrival to its end, or until now."""

    request_id: str
    arrived: Nanoseconds
    ended: Nanoseconds | None
    prompt_tokens: int
    output_tokens: int | None
    """None while it runs: the ledger hears of the first tokens and of the end."""
    preempted: int
    moved: int
    phases: tuple[Phase, ...]


class Step(Struct, frozen=True):
    """A milestone as it was told."""

    what: Milestone
    now: Nanoseconds
    replica: int
    tokens: int


class Stretch(Struct, frozen=True):
    """A phase without its causes."""

    name: str
    replica: int
    began: Nanoseconds
    ended: Nanoseconds


class RequestLog:
    """The milestones of the newest `keep` requests."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._steps: dict[str, list[Step]] = {}

    def tell(self, request_id: str, step: Step) -> None:
        """A request reached a milestone."""
        if step.what == Milestone.ARRIVED:
            if self._keep == 0:
                return
            self._steps.pop(request_id, None)  # a client may use an id again
            if len(self._steps) >= self._keep:
                del self._steps[next(iter(self._steps))]
            self._steps[request_id] = [step]
        else:
            known = self._steps.get(request_id)
            if known is not None:  # else it is older than the newest `keep`
                known.append(step)

    def ids(self) -> list[str]:
        """Oldest first."""
        return list(self._steps)

    def steps(self, request_id: str) -> list[Step]:
        """In order; empty if the request is not known (any more)."""
        return self._steps.get(request_id, [])


def stretches(steps: list[Step], now: Nanoseconds) -> list[Stretch]:
    """Tile a request's life, from its arrival to its end or `now`, by phases."""
    out: list[Stretch] = []
    name, replica, began = "queued", -1, Nanoseconds(0)
    answered = False
    for step in steps:
        if step.what != Milestone.ARRIVED and step.now > began:
            out.append(Stretch(name, replica, began, step.now))
        began, replica = step.now, step.replica
        if step.what == Milestone.ARRIVED:
            name = "queued"
        elif step.what == Milestone.ADMITTED:
            name = "decode" if answered else "prefill"
        elif step.what == Milestone.FIRST_TOKEN:
            name, answered = "decode", True
        elif step.what == Milestone.PREEMPTED:
            name = "requeued"
        elif step.what == Milestone.MOVED:
            name = "queued" if name == "queued" else "requeued"
        else:
            return out
    if now > began:
        out.append(Stretch(name, replica, began, now))
    return out
