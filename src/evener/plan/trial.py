"""Tries a plan on the traffic: the real scheduler in the simulator, with the plan's cost model in place of workers."""

from collections.abc import Callable, Sequence

import numpy as np
from msgspec import Struct, structs

from evener.brain import Brain, BrainConfig
from evener.engine.request import Request
from evener.execute.sim.body import Outcome, SimRequest, Simulator
from evener.ledger.ledger import Ledger
from evener.plan.capacity import Load, default_chunk
from evener.plan.problem import Bounds, Item, Problem
from evener.plan.search import Scored, plan_blocks
from evener.spec.memory import weight_bytes
from evener.spec.plan import Plan
from evener.units import NS_PER_S, Bytes, Nanoseconds, Seconds, ns

ROUNDS = 3
"""Without a rate, requests per row at least: enough that the plan is full for most of the time."""
MOST = 4000


class Spread(Struct, frozen=True):
    """Seconds."""

    mean: float
    p50: float
    p90: float
    p99: float


class Tried(Struct, frozen=True):
    """A plan, what the cost model predicted without queues, and what it did on the traffic in the simulator."""

    plan: Plan
    load: Load
    requests: int
    filled: bool
    """They were enough to keep all rows of the plan filled for most of the time."""
    refused: int
    duration_s: float
    """From the first arrival to the last token."""
    tokens_s: float
    """Output tokens per second over the duration."""
    full_tokens_s: float
    """Output tokens per second until the last request got its first token: while there was always work for all."""
    requests_s: float
    goodput: float
    """Requests per second that met the bounds (all completed ones, without bounds)."""
    met: float
    """Share of the requests that met the bounds."""
    ttft: Spread
    tpot: Spread
    e2e: Spread
    memory: Bytes
    """Weights over all devices."""
    kv_tokens: int
    """Over all replicas."""
    max_num_batched_tokens: int
    useful: float = 0.0
    """Share of the device time that computed what somebody asked for, once."""
    ledger: dict[str, dict[str, float]] = {}
    """Device -> cause -> share of its time."""


def plan_chunk(problem: Problem, plan: Plan) -> int:
    """Tokens of a prompt chunk, for all replicas of a plan alike."""
    costs = problem.costs(plan)
    count = range(len(plan.replicas))
    return default_chunk(lambda shape: max(costs.batch_ns(r, shape) for r in count), problem.most_batch_tokens)


def sample(problem: Problem, rows: int, most: int) -> list[Item]:
    """The requests to try a plan with `rows` rows on: with a rate the first `most`; without one, enough to fill it."""
    items = problem.items
    if problem.finite:
        return list(items)
    if problem.demand.rate is not None:
        return list(items[:most])
    wanted = min(MOST, max(most, ROUNDS * rows))
    return [items[k % len(items)]._replace(at=Seconds(0.0)) for k in range(wanted)]


def try_plan(problem: Problem, scored: Scored, items: Sequence[Item]) -> Tried:
    """Simulate a plan on these requests. Deterministic."""
    plan = scored.plan
    costs = problem.costs(plan)
    chunk = plan_chunk(problem, plan)
    blocks = [plan_blocks(problem, replica) for replica in plan.replicas]
    config = BrainConfig(
        policy=problem.policy, max_num_seqs=problem.max_num_seqs, max_num_batched_tokens=chunk, max_queue=1 << 40,
        block_tokens=problem.memory.block_tokens,
    )  # fmt: skip
    ledger = Ledger(plan, costs, start=Nanoseconds(0), resolution=None, follow_requests=0)
    brain = Brain(plan, blocks, costs, config, journal=ledger)
    traffic = [
        SimRequest(Request(f"q{k}", i.input_tokens, i.output_tokens), ns(i.at), i.output_tokens)
        for k, i in enumerate(items)
    ]
    outcomes = list(Simulator(brain, costs, traffic, ledger=ledger).run())
    account = ledger.account()
    weights = sum(
        weight_bytes(shard, stage, problem.model, problem.memory.dtype)
        for replica in plan.replicas
        for stage in replica.stages
        for shard in stage.shards
    )
    figures = _figures(
        scored, outcomes, problem.bounds, Bytes(weights), sum(blocks) * problem.memory.block_tokens, chunk
    )
    causes = {d: {c: s / use.wall_s for c, s in use.causes.items() if s > 0} for d, use in account.devices.items()}
    return structs.replace(figures, ledger=causes, useful=account.total.useful)


def _figures(
    scored: Scored, outcomes: Sequence[Outcome], bounds: Bounds, memory: Bytes, kv_tokens: int, chunk: int
) -> Tried:
    done = [o for o in outcomes if o.finish in ("stop", "length")]
    start = min(o.arrival for o in outcomes)
    end = max((o.ended or o.arrival for o in done), default=start)
    duration = max(1, end - start) / NS_PER_S
    ttft = np.array([(o.first_token or o.arrival) - o.arrival for o in done], dtype=np.float64) / NS_PER_S
    e2e = np.array([(o.ended or o.arrival) - o.arrival for o in done], dtype=np.float64) / NS_PER_S
    tokens = np.array([o.tokens for o in done], dtype=np.int64)
    many = tokens > 1
    tpot = (e2e[many] - ttft[many]) / (tokens[many] - 1)
    good = np.ones(len(done), dtype=bool)
    if bounds.ttft is not None:
        good &= ttft <= bounds.ttft
    if bounds.e2e is not None:
        good &= e2e <= bounds.e2e
    if bounds.tpot is not None:
        good[many] &= tpot <= bounds.tpot
    return Tried(
        plan=scored.plan,
        load=scored.load,
        requests=len(outcomes),
        filled=len(outcomes) >= ROUNDS * sum(c.rows for c in scored.load.replicas),
        refused=len(outcomes) - len(done),
        duration_s=duration,
        tokens_s=float(tokens.sum()) / duration,
        full_tokens_s=_while_full(done, start),
        requests_s=len(done) / duration,
        goodput=float(good.sum()) / duration,
        met=float(good.sum()) / len(outcomes),
        ttft=_spread(ttft),
        tpot=_spread(tpot),
        e2e=_spread(e2e),
        memory=memory,
        kv_tokens=kv_tokens,
        max_num_batched_tokens=chunk,
    )


def _while_full(done: Sequence[Outcome], start: int) -> float:
    until = max((o.first_token or 0 for o in done), default=start)
    tokens = 0.0
    for o in done:
        first, ended = o.first_token or until, o.ended or until
        # Between its first and last token a request moves on evenly, nearly.
        tokens += 1 + (o.tokens - 1) * (min(until, ended) - first) / max(1, ended - first)
    return tokens / max(1, until - start) * NS_PER_S


def _spread(values: "np.typing.NDArray[np.float64]") -> Spread:
    if not len(values):
        return Spread(0.0, 0.0, 0.0, 0.0)
    p50, p90, p99 = (float(x) for x in np.percentile(values, (50, 90, 99)))
    return Spread(float(values.mean()), p50, p90, p99)


Progress = Callable[[str, int, int], None]
"""Called with (what is done, steps done, steps in all)."""
