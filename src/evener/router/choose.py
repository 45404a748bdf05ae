"""Which replica serves a request.

`least-work` predicts, for each replica, when the request would be done given the work already there, adds how much it
would delay that work, and takes the least. The usual rules count the wrong thing. *Round robin* counts arrivals, but
one request may be a hundred times another, so queues drift apart while a neighbour idles. *Least requests* counts
requests; that is close to the best where replicas are equal and decode all their rows at once (Gupta,
Harchol-Balter, Sigman and Whitt, "Analysis of join-the-shortest-queue routing for web server farms", Perform. Eval.
64, 2007), but it gives a device of half the speed as many requests as the others, takes a long prompt for a short
one, and sees no cached prefix. Predicted seconds hold lengths, device speed and prefixes in one unit.
"""

from collections.abc import Callable, Sequence
from math import ceil
from typing import NamedTuple, Protocol

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
    predicts: bool
    """Whether it looks at more than the numbers of requests; else loads need say no more."""

    def choose(
        self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel,
        decode_left: Callable[[int], float] | None = None,
    ) -> int:  # fmt: skip
        """The `replica` that takes a request of `prompt_len` tokens and (expected) `output_tokens`.

        `decode_left`: what the `decode_tokens_left` of a replica is, where loads leave it out because it takes long to
        add up. Never a dead one. Raises Unavailable when none is alive.
        """
        ...


class RoundRobin:
    """The next living replica in turn. A baseline."""

    moves_waiting = False
    predicts = False

    def __init__(self) -> None:
        self._last = -1

    def choose(
        self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel,
        decode_left: Callable[[int], float] | None = None,
    ) -> int:  # fmt: skip
        """See `Router.choose`; looks at nothing but who is alive."""
        numbers = sorted(load.replica for load in living(loads))
        self._last = next((r for r in numbers if r > self._last), numbers[0])
        return self._last


class LeastRequests:
    """The living replica with the fewest requests, the lowest number on ties. A baseline."""

    moves_waiting = False
    predicts = False

    def choose(
        self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel,
        decode_left: Callable[[int], float] | None = None,
    ) -> int:  # fmt: skip
        """See `Router.choose`; counts requests."""
        return min((load.rows, load.replica) for load in living(loads))[1]


class LeastWork:
    """The living replica where the request costs all clients together the least predicted time.

    Ties go to the least work left in tokens, then to the fewest requests, then to the lowest number.
    """

    moves_waiting = True
    predicts = True

    def __init__(self) -> None:
        self._costs: CostModel | None = None
        self._steps: dict[int, int] = {}
        """Replica -> shortest step of any row, by these costs."""

    def choose(
        self, prompt_len: int, output_tokens: float, loads: Sequence[ReplicaLoad], costs: CostModel,
        decode_left: Callable[[int], float] | None = None,
    ) -> int:  # fmt: skip
        """See `Router.choose`; four predictions of the cost model per replica that comes into question."""
        alive = living(loads)
        if len(alive) == 1:
            return alive[0].replica
        if costs is not self._costs:
            self._costs, self._steps = costs, {}
        steps, output = self._steps, max(1.0, output_tokens)
        prompts: dict[int, BatchShape] = {}
        bounds: list[tuple[int, int, int, ReplicaLoad]] = []
        for load in alive:
            replica, cached = load.replica, load.cached_prefix_tokens
            step = steps.get(replica)
            if step is None:
                step = steps[replica] = costs.latency_ns(replica, _ONE_ROW)
            prompt = prompts.get(cached)
            if prompt is None:
                prompt = prompts[cached] = _own_prompt(prompt_len, cached)
            alone: int = costs.batch_ns(replica, prompt)
            # No prediction is shorter than this one: costs do not fall when there is more to do.
            bounds.append((alone * (1 + load.running_rows) + round(step * output), replica, alone, load))
        bounds.sort()
        best: tuple[int, float, int, int] | None = None
        for bound, replica, alone, load in bounds:
            if best is not None and bound > best[0]:
                break
            left = load.decode_tokens_left if decode_left is None else decode_left(replica)
            cost = sum(_predict(prompt_len, output, load, left, alone, costs))
            entry = (cost, load.prefill_tokens_left + left, load.rows, replica)
            if best is None or entry < best:
                best = entry
        assert best is not None
        return best[-1]


_ONE_ROW = BatchShape(decode_rows=1, sampled_rows=1)


class Prediction(NamedTuple):
    """What a request would cost on one replica, in nanoseconds, both >= 0."""

    done: int
    """Until it is done."""
    delay: int
    """By which it makes others later, summed over them."""


def predict(prompt_len: int, output_tokens: float, load: ReplicaLoad, costs: CostModel) -> Prediction:
    """The cost of a request of `prompt_len` and expected `output_tokens` on a replica with this load.

    *Done*: the prompt tokens queued there and its own that are not cached (at least one) are computed; then its output
    tokens take one step each, with as many rows as are there on average meanwhile (those present, fewer if they end
    much earlier, at most the slots); a missing slot or missing KV blocks wait for the rows that hold them. *Delay*: its
    prefill holds up the running rows, and one row more makes every step that it shares with another longer.
    """
    alone = costs.batch_ns(load.replica, _own_prompt(prompt_len, load.cached_prefix_tokens))
    return _predict(prompt_len, max(1.0, output_tokens), load, load.decode_tokens_left, alone, costs)


def _own_prompt(prompt_len: int, cached: int) -> BatchShape:
    """The prompt tokens of a request that are not cached, as one chunk."""
    own = max(1, prompt_len - cached)
    return BatchShape(own, own * (prompt_len - own) + own * (own + 1) // 2, sampled_rows=1, chunks=1)


def _predict(
    prompt_len: int, output: float, load: ReplicaLoad, decode_left: float, prefill_own: int, costs: CostModel
) -> Prediction:
    """See `predict`."""
    prefill = prefill_own
    present, slots = load.rows, load.max_rows
    if load.prefill_tokens_left:
        own = _own_prompt(prompt_len, load.cached_prefix_tokens)
        prompts = load.waiting_rows + 1
        queue = BatchShape(
            prefill_tokens=load.prefill_tokens_left + own.prefill_tokens,
            prefill_pairs=load.prefill_pairs_left + own.prefill_pairs,
            chunks=prompts,
            sampled_rows=prompts,
        )
        prefill = costs.batch_ns(load.replica, queue)

    rows = ceil(max(1.0, min(present + 1, slots, 1 + decode_left / output)))
    # Whole keys per row: rounded for each batch by itself, more work there could seem to delay others less.
    keys = ceil((load.context_tokens + prompt_len + output / 2) / (present + 1))
    step = costs.latency_ns(load.replica, BatchShape(0, 0, rows, rows * keys, rows))
    shared = min(decode_left, present * output)
    late = 0
    if shared:
        longer = costs.latency_ns(load.replica, BatchShape(0, 0, rows + 1, (rows + 1) * keys, rows + 1))
        late = round(shared * (longer - step))

    need = ceil((prompt_len + output) / load.block_tokens) - load.cached_prefix_tokens // load.block_tokens
    no_blocks = max(0, need - load.kv_blocks_free) / max(1, load.kv_blocks - load.kv_blocks_free)
    no_slot = max(0, present + 1 - slots) / slots
    drain = decode_left / max(1, min(present, slots))
    return Prediction(
        done=prefill + round(step * (output + drain * max(no_blocks, no_slot))),
        delay=load.running_rows * prefill_own + late,
    )


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
