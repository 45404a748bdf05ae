"""What a plan is searched for: model, devices, traffic, limits, and what counts as good. Frozen data.

The traffic is reduced to the moments that settled batches need (`Demand`); the requests themselves are kept for the
simulation that makes the last choice.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from msgspec import Struct

from evener.cost.base import BatchShape, CostModel
from evener.cost.rates import Profile, bind
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidTrace
from evener.spec.cluster import Cluster, Device
from evener.spec.memory import BLOCK_TOKENS, MemoryConfig
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import Bytes, Seconds

CostFactory = Callable[[ModelSpec, Plan, Cluster], CostModel]
"""Makes the cost model of one plan; the cluster holds the devices that work at the same time."""


class Item(NamedTuple):
    """One request of the traffic that is planned for."""

    at: Seconds
    input_tokens: int
    output_tokens: int


class Demand(Struct, frozen=True):
    """Moments of the traffic. Lengths in tokens, over requests unless stated."""

    input_tokens: float
    """Mean prompt."""
    output_tokens: float
    """Mean answer."""
    input_square: float
    """Mean of the squared prompt: prefill attention grows with it."""
    context: float
    """Keys that a decoding row reads, averaged over decode steps (long answers count for longer)."""
    longest: int
    """Prompt and answer of the longest request."""
    rate: float | None = None
    """Requests per second; None: as many as can be served."""
    cached: float = 0.0
    """Share of prompt tokens found in the prefix cache."""

    @property
    def computed(self) -> float:
        """Prompt tokens to compute per request."""
        return self.input_tokens * (1.0 - self.cached)

    @property
    def pairs(self) -> float:
        """(query, key) pairs of prefill per request."""
        return self.input_square * (1.0 - self.cached**2) / 2

    def kv_tokens(self) -> float:
        """KV tokens that a running row holds on average, with the unused half of its last block."""
        return self.context + BLOCK_TOKENS / 2

    def settled(self, rows: float) -> BatchShape:
        """The batch of `rows` decoding rows, and the prefill that replaces what they finish."""
        entering = rows / self.output_tokens
        return BatchShape(
            prefill_tokens=round(entering * self.computed),
            prefill_pairs=round(entering * self.pairs),
            decode_rows=round(rows),
            decode_context=round(rows * self.context),
            sampled_rows=round(rows + entering),
            chunks=math.ceil(entering),
        )

    def prompt(self) -> BatchShape:
        """One whole mean prompt as a batch."""
        return BatchShape(prefill_tokens=max(1, round(self.computed)), prefill_pairs=round(self.pairs),
                          sampled_rows=1, chunks=1)  # fmt: skip

    def decode(self, rows: int) -> BatchShape:
        """A step of `rows` decoding rows alone."""
        return BatchShape(decode_rows=rows, decode_context=round(rows * self.context), sampled_rows=rows)


def demand_of(items: Sequence[Item], rate: float | None = None, cached: float = 0.0) -> Demand:
    """Moments of these requests. Raises InvalidTrace when there are none."""
    if not items:
        raise InvalidTrace("there is no request to plan for; give a trace with rows, or a rate and lengths")
    n = len(items)
    steps = sum(i.output_tokens for i in items)
    return Demand(
        input_tokens=sum(i.input_tokens for i in items) / n,
        output_tokens=steps / n,
        input_square=sum(i.input_tokens**2 for i in items) / n,
        context=sum((i.input_tokens + i.output_tokens / 2) * i.output_tokens for i in items) / steps,
        longest=max(i.input_tokens + i.output_tokens for i in items),
        rate=rate,
        cached=cached,
    )


class Bounds(Struct, frozen=True):
    """Service-level objective of a request, seconds; None is no bound."""

    ttft: Seconds | None = None
    tpot: Seconds | None = None
    e2e: Seconds | None = None

    def __bool__(self) -> bool:
        return (self.ttft, self.tpot, self.e2e) != (None, None, None)


@dataclass(frozen=True)
class Problem:
    """Everything the search looks at. `profile` knows every device of the cluster."""

    model: ModelSpec
    cluster: Cluster
    profile: Profile
    demand: Demand
    items: tuple[Item, ...]
    memory: MemoryConfig = field(default_factory=lambda: MemoryConfig(max_batch_tokens=2048))
    kv_bytes: Bytes | None = None
    """Room for KV on a device of this host, or that declares no memory; None: it must declare it."""
    host_bytes: Bytes | None = None
    """What devices that declare no memory have together, for weights, activations and KV: the memory of this host."""
    max_num_seqs: int = 64
    finite: bool = False
    """The items are all there is to serve, not a sample of what comes: draining counts."""
    bounds: Bounds = field(default_factory=Bounds)
    policy: str = "equal-time"
    factory: CostFactory | None = None
    """None: roofline over `profile`."""

    @property
    def most_batch_tokens(self) -> int:
        """Tokens of prompts in one batch that the workspace is sized for."""
        return max(1, self.memory.max_batch_tokens - self.max_num_seqs)

    def costs(self, plan: Plan, among: Sequence[Device] | None = None) -> CostModel:
        """The cost model of a plan. `among`: the devices that work at the same time (default: the plan's own)."""
        if among is None:
            names = set(plan.devices())
            among = [d for d in self.cluster.devices if d.name in names]
        cluster = Cluster(tuple(among), self.cluster.links)
        if self.factory is not None:
            return self.factory(self.model, plan, cluster)
        return RooflineCostModel(
            self.model, plan, bind(self.profile, among), dtype=self.memory.dtype, kv_dtype=self.memory.kv_dtype,
            links=cluster.links,
        )  # fmt: skip

    def least_blocks(self) -> int:
        """KV blocks that the longest request needs: a replica with fewer would refuse it."""
        return -(-self.demand.longest // self.memory.block_tokens)

    def blocks_for(self, rows: int) -> int:
        """KV blocks that `rows` running rows hold."""
        return max(self.least_blocks(), math.ceil(rows * self.demand.kv_tokens() / self.memory.block_tokens))
