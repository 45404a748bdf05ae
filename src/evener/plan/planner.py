"""The planner: search, try the best in the simulator, choose, and keep what is needed to explain the choice."""

import time
from typing import Any

from msgspec import Struct, structs

from evener.plan.baselines import equalised, score_or_reason, score_usual
from evener.plan.choose import best_tried, goal_of, pareto, shortlist
from evener.plan.problem import Item, Problem
from evener.plan.search import Scored, search
from evener.plan.trial import Progress, Tried, sample, try_plan

TRIALS = 8
"""Plans that are simulated."""


class Baseline(Struct, frozen=True):
    """One of the usual layouts: tried, or why it cannot serve."""

    name: str
    tried: Tried | None
    reason: str = ""


class Choice(Struct, frozen=True):
    """What was chosen, and beside what."""

    goal: str
    finite: bool
    """As in the problem."""
    best: Tried
    others: tuple[Tried, ...]
    """The other plans that were simulated, the usual layouts included."""
    baselines: tuple[Baseline, ...]
    front: tuple[Tried, ...]
    considered: int
    """Plans scored by the cost model."""
    items: tuple[Item, ...]
    """The requests that all were tried on."""
    search_s: float
    trial_s: float


def choose_plan(
    problem: Problem, *, trials: int = TRIALS, requests: int = 400, baselines: bool = True,
    progress: Progress = lambda what, done, steps: None,
) -> Choice:  # fmt: skip
    """Search, simulate, choose. Raises InvalidPlan, with the shortage in bytes, when nothing fits.

    The usual layouts are tried too: where one of them is the best, it is the choice.
    """
    began = time.perf_counter()
    progress("searching", 0, 1)
    scored = search(problem)
    searched = time.perf_counter()
    listed = shortlist(problem, scored, trials)
    usual = score_usual(problem) if baselines else []
    able = [*listed, *(found for _, found in usual if not isinstance(found, str))]
    # The same requests for all, enough to fill the plan that holds the most rows.
    items = sample(problem, max(sum(c.rows for c in s.load.replicas) for s in able), requests)
    steps = len(able) + 1
    tried: list[Tried] = []

    def attempt(one: Scored) -> Tried:
        for known in tried:
            if known.plan.replicas == one.plan.replicas:
                return known
        progress(f"simulating {one.plan.name}", len(tried), steps)
        tried.append(try_plan(problem, one, items))
        return tried[-1]

    for one in listed:
        attempt(one)
    compared = [
        Baseline(name, None, found) if isinstance(found, str) else Baseline(name, attempt(found))
        for name, found in usual
    ]
    best = best_tried(problem, tried)
    if baselines and len(best.plan.devices()) > len(best.plan.replicas):
        name = "the choice, split equally"
        equal = score_or_reason(problem, equalised(best.plan, problem.model), name)
        first = Baseline(name, None, equal) if isinstance(equal, str) else Baseline(name, attempt(equal))
        compared.insert(0, first)
        best = best_tried(problem, tried)
    return Choice(
        goal=goal_of(problem),
        finite=problem.finite,
        best=best,
        others=tuple(t for t in tried if t is not best),
        baselines=tuple(compared),
        front=tuple(pareto(tried)),
        considered=len(scored),
        items=tuple(items),
        search_s=searched - began,
        trial_s=time.perf_counter() - searched,
    )


def as_json(choice: Choice) -> dict[str, Any]:
    """The choice as plain data."""
    return {
        "goal": choice.goal,
        "plan": choice.best.plan.name,
        "predicted": figures(choice.best),
        "alternatives": [figures(t) for t in choice.others],
        "baselines": [
            {"name": b.name, "reason": b.reason} if b.tried is None else {**figures(b.tried), "name": b.name}
            for b in choice.baselines
        ],
        "front": [figures(t) for t in choice.front],
        "plans_scored": choice.considered,
        "search_s": choice.search_s,
        "simulate_s": choice.trial_s,
    }


def figures(t: Tried) -> dict[str, Any]:
    """A tried plan in figures; seconds, bytes, per second."""
    out: dict[str, Any] = {
        "name": t.plan.name,
        "devices": list(t.plan.devices()),
        "capacity_tok_s": t.load.tokens_s,
        "capacity_req_s": t.load.requests_s,
    }
    for name in ("requests", "refused", "duration_s", "tokens_s", "full_tokens_s", "requests_s", "goodput", "met"):
        out[name] = getattr(t, name)
    for name in ("ttft", "tpot", "e2e"):
        out[f"{name}_s"] = structs.asdict(getattr(t, name))
    out |= {
        "weights_bytes": int(t.memory),
        "kv_tokens": t.kv_tokens,
        "max_num_batched_tokens": t.max_num_batched_tokens,
    }
    return {**out, "useful": t.useful, "ledger": t.ledger}
