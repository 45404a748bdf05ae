"""`simulate`: a plan under traffic in virtual time, for devices that need not be here. No weights, no workers.

    from evener.simulate import SimulateOptions, simulate

    result = simulate(SimulateOptions(model="config.json", cluster="cluster.yaml", tensor_parallel_size=2,
                                      traffic="trace.csv", slo="ttft=2s,tpot=100ms"))
    print(result.report.output_tok_s, result.verdict)

What it takes to simulate something else (many replicas, generated traffic) is in `evener.execute.sim.body`.
"""

import time
from collections.abc import Callable, Iterable, Iterator

from msgspec import Struct

from evener.brain import Brain, BrainConfig
from evener.cost.base import CostModel
from evener.cost.rates import bind
from evener.cost.work import PlanWork
from evener.engine.policy import make_policy
from evener.engine.request import Request
from evener.errors import InvalidInput
from evener.execute.sim.body import Simulator
from evener.execute.sim.figures import Figures, SimReport
from evener.execute.sim.traffic import Failure, SimRequest, SlowDown
from evener.ledger.account import Account
from evener.ledger.finding import Hints, hints_of
from evener.ledger.ledger import Ledger
from evener.ledger.verdict import verdict
from evener.plan.default import default_plan, equal_plan
from evener.plan.load import AUTO, check_layout, load_plan
from evener.plan.planner import choose_plan
from evener.plan.problem import Item, Problem
from evener.plan.search import plan_blocks
from evener.plan.trial import plan_chunk
from evener.planning import DEFAULT_TRAFFIC, PlanOptions, check_objective, make_problem
from evener.router.choose import make_router
from evener.spec.plan import Plan, validate
from evener.spec.traffic import TrafficMix
from evener.units import NS_PER_S, Nanoseconds, Seconds, ns

UNLIMITED = 1 << 40
MOST_CHECKPOINTS = 64
"""Devices for which the ledger keeps checkpoints, to look into windows; for more it keeps totals."""


class SimulateOptions(Struct, frozen=True, kw_only=True):
    """What `evener simulate` is told. Names are those of the options; they mean the same as for serve and plan."""

    model: str | None = None
    """Directory, .gguf file, hub id, or a config.json alone; None: the default model."""
    cluster: str | None = None
    devices: tuple[str, ...] = ()
    plan: str | None = None
    """YAML file, or `auto` to choose as `evener plan` does; excludes the three sizes and an equal split."""
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    data_parallel_size: int = 1
    split: str = "time"
    traffic: str = DEFAULT_TRAFFIC
    slo: str | None = None
    dtype: str | None = None
    kv_dtype: str | None = None
    kv_cache_memory: str | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    max_queue: int | None = None
    """None: no limit."""
    policy: str = "equal-time"
    costs: str = "rates"
    """As for `evener plan`."""
    router: str = "least-work"
    max_tokens: int | None = None
    """What requests ask for; answers end where the traffic says. None: they ask for just that, as in `evener bench`."""
    static_batch: int = 32
    static_wait_s: float = 0.1
    host_us: float = 0.0
    """Between a result and what is issued upon it, and between issue and start, beside the profile's time per batch."""
    fail: tuple[str, ...] = ()
    """`DEVICE@SECONDS`."""
    slow: tuple[str, ...] = ()
    """`DEVICE@SECONDS=FACTOR`."""
    ledger: bool = True
    fast: bool = True


class Simulated(Struct, frozen=True, kw_only=True):
    """What a simulation showed."""

    plan: Plan
    report: SimReport
    account: Account | None
    """None without a ledger."""
    hints: Hints
    """What the verdict may name."""
    verdict: list[str]
    kv_blocks: list[int]
    """Per replica."""
    max_num_batched_tokens: int
    events: int
    """Arrivals, results, timers, ...; skipped steps included."""
    took_s: float
    """Processor time of this process."""


def simulate(options: SimulateOptions, on_end: Callable[[int], None] = lambda ended: None) -> Simulated:
    """Simulate to the end of the traffic. `on_end` hears how many requests have ended.

    Deterministic: the same options give the same result. Raises InvalidInput or InvalidPlan before anything runs.
    """
    problem, plan = _prepare(options)
    costs = problem.costs(plan)
    chunk = options.max_num_batched_tokens or plan_chunk(problem, plan)
    blocks = [plan_blocks(problem, replica) for replica in plan.replicas]
    config = BrainConfig(
        policy=options.policy,
        router=options.router,
        max_num_seqs=problem.max_num_seqs,
        max_num_batched_tokens=chunk,
        max_queue=UNLIMITED if options.max_queue is None else options.max_queue,
        block_tokens=problem.memory.block_tokens,
        static_batch=options.static_batch,
        static_wait_ns=ns(options.static_wait_s),
    )
    bounds = problem.bounds
    figures = Figures(*(None if b is None else b * NS_PER_S for b in (bounds.ttft, bounds.tpot, bounds.e2e)))
    ledger = _ledger(problem, plan, costs) if options.ledger else None

    def ended(outcome: object) -> None:
        figures(outcome)  # type: ignore[arg-type]
        on_end(figures.requests)

    began = time.process_time()
    simulator = Simulator(
        Brain(plan, blocks, costs, config, journal=ledger),
        costs,
        _requests(problem.items, options.max_tokens),
        failures=[Failure(name, at) for name, at, _ in _planned(options.fail, "--fail", plan)],
        slow_downs=[SlowDown(name, at, factor) for name, at, factor in _planned(options.slow, "--slow", plan)],
        host_ns=round(options.host_us * 1e3),
        ledger=ledger,
        on_end=ended,
        fast=options.fast,
    )
    simulator.run()
    account = ledger.account() if ledger is not None else None
    hints = hints_of(problem.model, problem.memory.kv_dtype, config.max_num_seqs)
    return Simulated(
        plan=plan,
        report=figures.report(),
        account=account,
        hints=hints,
        verdict=verdict(account, hints).text() if account is not None else [],
        kv_blocks=blocks,
        max_num_batched_tokens=chunk,
        events=simulator.events,
        took_s=time.process_time() - began,
    )


def _prepare(options: SimulateOptions) -> tuple[Problem, Plan]:
    make_policy(options.policy)
    make_router(options.router)
    for what, value, least in (
        ("max_num_batched_tokens", options.max_num_batched_tokens, 1), ("max_queue", options.max_queue, 0),
        ("max_tokens", options.max_tokens, 1), ("static_batch", options.static_batch, 1),
        ("host_us", options.host_us, 0), ("static_wait_s", options.static_wait_s, 0),
    ):  # fmt: skip
        if value is not None and not least <= value < UNLIMITED:
            raise InvalidInput(f"{what}={value} must be a number of at least {least}")
    names = {name: getattr(options, name) for name in PlanOptions.__struct_fields__}
    problem = make_problem(PlanOptions(**names))
    return problem, _plan(options, problem)


def _plan(options: SimulateOptions, problem: Problem) -> Plan:
    tp, pp, dp = options.tensor_parallel_size, options.pipeline_parallel_size, options.data_parallel_size
    devices = problem.cluster.devices
    if options.plan is not None:
        check_layout(options.plan, options.split, (tp, pp, dp))
        if options.plan == AUTO:
            return choose_plan(check_objective(problem)).best.plan
        plan = load_plan(options.plan, problem.model)
    elif options.split == "equal":
        plan = equal_plan(problem.model, devices, tp, pp, dp)
    elif options.split == "time":
        demand = problem.demand
        mix = TrafficMix(demand.input_tokens, demand.output_tokens, min(32, problem.max_num_seqs))
        plan = default_plan(
            problem.model, devices, tp, pp, dp, problem.profile, mix, memory=problem.memory,
            links=problem.cluster.links, dtype=problem.memory.dtype,
        )  # fmt: skip
    else:
        raise InvalidInput(f"split {options.split!r} is unknown; use time or equal")
    validate(plan, problem.model, problem.cluster)
    return plan


def _ledger(problem: Problem, plan: Plan, costs: CostModel) -> Ledger:
    names = set(plan.devices())
    profile = bind(problem.profile, [d for d in problem.cluster.devices if d.name in names])
    work = PlanWork(problem.model, plan, profile, problem.memory.dtype, problem.memory.kv_dtype)
    if len(names) > MOST_CHECKPOINTS:
        return Ledger(plan, costs, start=Nanoseconds(0), work=work, resolution=None)
    return Ledger(plan, costs, start=Nanoseconds(0), work=work)


def _requests(items: Iterable[Item], cap: int | None) -> Iterator[SimRequest]:
    for k, item in enumerate(items):
        asked = item.output_tokens if cap is None else cap
        yield SimRequest(Request(f"q{k}", item.input_tokens, asked), ns(item.at), item.output_tokens)


def _planned(texts: Iterable[str], option: str, plan: Plan) -> Iterator[tuple[str, Nanoseconds, float]]:
    """(device, time, factor) from `DEVICE@SECONDS` or `DEVICE@SECONDS=FACTOR`."""
    slow = option == "--slow"
    for text in texts:
        name, at, rest = text.strip().rpartition("@")
        when, equals, much = rest.partition("=")
        try:
            moment, factor = Seconds(float(when)), float(much) if slow else 1.0
        except ValueError:
            moment, factor = Seconds(-1.0), 0.0
        if not at or bool(equals) != slow or not 0 <= moment < 1e9 or not 1.0 <= factor <= 1000:
            form = "DEVICE@SECONDS, like cpu:0@30"
            if slow:
                form = "DEVICE@SECONDS=FACTOR, like cpu:0@30=2, with a factor from 1 (as fast as usual) to 1000"
            raise InvalidInput(f"{option} {text!r}: write {form}")
        if name not in plan.devices():
            shown = ", ".join(plan.devices()[:8]) + (", ..." if len(plan.devices()) > 8 else "")
            raise InvalidInput(f"{option} {text!r}: the plan has no device {name!r} (it has {shown})")
        yield name, ns(moment), factor
