"""Which replica serves a request.

`least-work` sends a request where it is predicted to be done first, counting the work already there. The usual rules
count the wrong thing. *Round robin* counts arrivals, but one request may be a hundred times another, so queues drift
apart while a neighbour idles. *Least requests* counts requests, so a replica with two long prompts looks emptier than
one with three that are about to end, and a device of half the speed gets half of the requests. Work left in predicted
seconds holds lengths, device speed and cached prefixes in one unit. It is the rule called Dynamic or
Least-Work-Remaining in the literature (Harchol-Balter, Crovella and Murta, "On choosing a task assignment policy for a
distributed server system", J. Parallel Distrib. Comput. 59, 1999), which equals one central queue when sizes are known;
here they are predicted.
"""

from collections.abc import Sequence
from math import ceil
from typing import Protocol

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.errors import InvalidInput, Unavailable


class ReplicaLoad(Struct, frozen=True):
    """What the router knows of one replica, for one request. Sums, so that a choice is O(replicas)."""

    replica: int
    alive: bool = True
    waiting_rows: int = 0
    """Requests that wait for a slot."""
    running_rows: int = 0
    """Requests that hold a slot."""
    prefill_tokens_left: int = 0
    """Prompt tokens not yet computed, of waiting and running requests."""
    prefill_pairs_left: int = 0
    """(query, key) pairs that these tokens still cost."""
    decode_tokens_left: float = 0.0
    """Expected output tokens left, of waiting and running requests."""
    context_tokens: int = 0
    """Tokens known or cached of waiting and running requests: what their decode steps read."""
    max_rows: int = 64
    """Requests that may hold a slot at once."""
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    """Free or evictable."""
    block_tokens: int = 16
    cached_prefix_tokens: int = 0
    """Of this request's prompt, found on this replica."""

    @property
    def rows(self) -> int:
        """Requests that have not ended."""
        return self.waiting_rows + self.running_rows


class Router(Protocol):
    """A routing rule. Deterministic: the same calls give the same choices."""

    moves_waiting: bool
    """Whether idle replicas may take over requests that wait elsewhere."""

    def choose(self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel) -> int:
        """The `replica` that takes a request of `prompt_len` tokens and (expected) `output_tokens`.

        Never a dead one. Raises Unavailable when none is alive.
        """
        ...


class RoundRobin:
    """The next living replica in turn. A baseline."""

    moves_waiting = False

    def __init__(self) -> None:
        self._last = -1

    def choose(self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel) -> int:
        """See `Router.choose`; looks at nothing but who is alive."""
        numbers = sorted(load.replica for load in living(loads))
        self._last = next((r for r in numbers if r > self._last), numbers[0])
        return self._last


class LeastRequests:
    """The living replica with the fewest requests, the lowest number on ties. A baseline."""

    moves_waiting = False

    def choose(self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel) -> int:
        """See `Router.choose`; counts requests."""
        return min((load.rows, load.replica) for load in living(loads))[1]


class LeastWork:
    """The living replica where the request is predicted to be done first.

    Ties go to the least work left in tokens, then to the fewest requests, then to the lowest number.
    """

    moves_waiting = True

    def choose(self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel) -> int:
        """See `Router.choose`; two predictions of the cost model per replica."""
        return min(
            (
                done_ns(prompt_len, output_tokens, load, costs),
                load.prefill_tokens_left + load.decode_tokens_left,
                load.rows,
                load.replica,
            )
            for load in living(loads)
        )[-1]


def done_ns(prompt_len: int, output_tokens: float, load: ReplicaLoad, costs: CostModel) -> int:
    """Predicted nanoseconds until this request would be done on this replica; >= 0, non-decreasing in the work there.

    Three terms. *Prefill*: the prompt tokens queued and this request's own that are not cached, at least one. *Decode*:
    all output tokens expected, this request's included, in steps of as many rows as run on average meanwhile: those
    present, at most the slots, fewer if they end long before this request does. *KV*: blocks that are missing must
    be freed by what runs, at the rate at which decoding drains.
    """
    own = max(1, prompt_len - load.cached_prefix_tokens)
    shape = BatchShape(
        prefill_tokens=load.prefill_tokens_left + own,
        prefill_pairs=load.prefill_pairs_left + own * (prompt_len - own) + own * (own + 1) // 2,
        chunks=load.waiting_rows + 1,
        sampled_rows=load.waiting_rows + 1,
    )
    prefill = costs.batch_ns(load.replica, shape)

    output = max(1.0, output_tokens)
    tokens = load.decode_tokens_left + output
    rows = max(1.0, min(load.rows + 1, load.max_rows, tokens / output))
    per_row = (load.context_tokens + prompt_len + output / 2) / (load.rows + 1)
    n = ceil(rows)
    step = costs.latency_ns(load.replica, BatchShape(decode_rows=n, decode_context=ceil(n * per_row), sampled_rows=n))
    decode = tokens / rows * step

    need = ceil((prompt_len + output) / load.block_tokens) - load.cached_prefix_tokens // load.block_tokens
    missing = max(0, need - load.kv_blocks_free)
    held = max(1, load.kv_blocks - load.kv_blocks_free)
    waits = load.decode_tokens_left / rows * step * min(1.0, missing / held)
    return prefill + round(decode + waits)


def living(loads: Sequence[ReplicaLoad]) -> list[ReplicaLoad]:
    """The replicas that are alive. Raises Unavailable when there is none."""
    alive = [load for load in loads if load.alive]
    if not alive:
        raise Unavailable(
            f"none of {len(loads)} replicas is alive; restart the server, or leave the lost devices out of the plan"
        )
    return alive


ROUTERS: dict[str, type[RoundRobin] | type[LeastRequests] | type[LeastWork]] = {
    "round-robin": RoundRobin,
    "least-requests": LeastRequests,
    "least-work": LeastWork,
}


def make_router(name: str = "least-work") -> Router:
    """A fresh router by name. Raises InvalidInput listing the names."""
    try:
        return ROUTERS[name]()
    except KeyError:
        raise InvalidInput(f"router {name!r} is unknown; choose one of {', '.join(ROUTERS)}") from None
