"""Is a given layout, say that of training, viable for this traffic on these devices? In words and figures.

The layout is taken as training would run it: equal layers, heads and columns over the devices in order. It is tried in
the simulator; what the ledger then shows as lost is said with the device it falls on and the remedy. Every share quoted
is in the ledger that comes with the verdict.
"""

import re
from collections.abc import Sequence

from msgspec import Struct, structs

from evener.errors import InvalidInput, InvalidPlan
from evener.ledger.causes import COMPUTE, Cause
from evener.plan.baselines import score_or_reason
from evener.plan.default import equal_plan
from evener.plan.problem import Item, Problem
from evener.plan.trial import Tried, try_plan
from evener.spec.plan import Plan, size

_PART = re.compile(r"^(tp|pp|dp)=(\d+)$")
NOTICEABLE = 0.05
"""Of a device's time: a smaller loss is not worth a sentence."""


class Assessment(Struct, frozen=True):
    """The verdict on one layout."""

    layout: str
    verdict: str
    """`cannot serve`, `unfit`, `wasteful` or `viable`."""
    findings: tuple[str, ...]
    tried: Tried | None


def parse_layout(text: str) -> tuple[int, int, int]:
    """`tp=8,pp=4,dp=2` -> (8, 4, 2); what is left out is 1. Raises InvalidInput."""
    sizes = {"tp": 1, "pp": 1, "dp": 1}
    seen = set()
    for part in text.replace(" ", "").split(","):
        m = _PART.match(part)
        if not m or int(m.group(2)) < 1 or m.group(1) in seen:
            raise InvalidInput(f"layout {text!r}: {part!r} is not understood; write tp=8,pp=4,dp=2")
        seen.add(m.group(1))
        sizes[m.group(1)] = int(m.group(2))
    return sizes["tp"], sizes["pp"], sizes["dp"]


def assess(
    problem: Problem, layout: tuple[int, int, int], items: Sequence[Item], best: Tried | None = None
) -> Assessment:
    """Try the layout on `items`; `best`: what the planner would do instead."""
    tp, pp, dp = layout
    name = f"tp={tp},pp={pp},dp={dp}"
    try:
        plan = equal_plan(problem.model, problem.cluster.devices, tp, pp, dp)
    except InvalidPlan as error:
        return Assessment(name, "cannot serve", (error.message,), None)
    return judge_plan(problem, structs.replace(plan, name=name), items, best)


def judge_plan(problem: Problem, plan: Plan, items: Sequence[Item], best: Tried | None = None) -> Assessment:
    """Try any plan on `items`."""
    name = plan.name
    scored = score_or_reason(problem, plan, name)
    if isinstance(scored, str):
        return Assessment(name, "cannot serve", (scored,), None)
    tried = try_plan(problem, scored, items)
    findings = [*_demand(problem, tried), *_losses(tried), *_shape(problem, plan, tried)]
    unfit = (problem.demand.rate or 0.0) > tried.load.requests_s or (bool(problem.bounds) and tried.met < 0.9)
    if best is not None:
        times = best.load.tokens_s / tried.load.tokens_s
        findings.append(
            f"the planner's choice, {best.plan.name}, serves {best.load.tokens_s:.4g} tokens/s at most: {times:.2f} "
            f"times as much; mean time per request {best.e2e.mean:.3g} s against {tried.e2e.mean:.3g} s"
        )
        wasteful = times > 1.1
    else:
        wasteful = tried.useful < 0.8 and problem.demand.rate is None
    verdict = "unfit" if unfit else "wasteful" if wasteful else "viable"
    return Assessment(name, verdict, tuple(findings), tried)


def _demand(problem: Problem, tried: Tried) -> list[str]:
    out = []
    rate = problem.demand.rate
    if rate is not None:
        can = tried.load.requests_s
        word = "which exceeds" if rate > can else f"{rate / can:.0%} of"
        out.append(f"the traffic brings {rate:.3g} requests/s, {word} the {can:.3g} it can serve")
    if problem.bounds:
        out.append(f"{tried.met:.0%} of the requests meet the objective (p90 TTFT {tried.ttft.p90:.3g} s, "
                   f"p90 TPOT {tried.tpot.p90 * 1e3:.3g} ms)")  # fmt: skip
    return out


_REMEDY = {
    Cause.STRAGGLER: "waits for a slower device of its stage: split heads and columns by speed, or group equal devices",
    Cause.BUBBLE: "is idle while its replica works elsewhere in the pipe: give slower stages fewer layers, or use "
    "fewer stages",
    Cause.TRANSFER: "moves data: keep tensor parallelism within one host, or use less of it",
    Cause.HOST: "waits for the control process: larger batches, or fewer stages",
    Cause.CONTENDED: "shares its hardware with another worker: use one worker per core",
    Cause.KV_STARVED: "is idle for want of KV blocks: more memory, a smaller KV dtype, or larger replicas",
    Cause.IMBALANCE: "is idle while requests queue at another replica: like replicas, or least-work routing",
    Cause.RECOMPUTE: "computes again what preemption threw away: more KV room or fewer sequences at once",
    Cause.PADDING: "computes padding: continuous batching",
    Cause.HELD: "waits for batches to fill or to end: --policy equal-time",
}


def _losses(tried: Tried) -> list[str]:
    """Largest losses by cause: on which device most, what it means, the remedy."""
    out = []
    for cause, words in _REMEDY.items():
        shares = {d: causes.get(cause.label, 0.0) for d, causes in tried.ledger.items()}
        worst = max(shares, key=lambda d: (shares[d], d))
        if shares[worst] >= NOTICEABLE:
            mean = sum(shares.values()) / len(shares)
            out.append((mean, f"{cause.label}: {worst} {words} ({shares[worst]:.0%} of its time, {mean:.0%} over all)"))
    out.sort(key=lambda pair: -pair[0])
    busy = sum(sum(c.get(x.label, 0.0) for x in COMPUTE) for c in tried.ledger.values()) / len(tried.ledger)
    return [f"devices compute {busy:.0%} of the time, {tried.useful:.0%} usefully", *(text for _, text in out)]


def _shape(problem: Problem, plan: Plan, tried: Tried) -> list[str]:
    """What follows from model and layout alone."""
    out = []
    heads = sorted({size(sh.heads) for r in plan.replicas for s in r.stages for sh in s.shards})
    if len(heads) > 1:
        out.append(
            f"{problem.model.heads} query heads do not divide evenly: shards hold {' or '.join(map(str, heads))}, "
            "which engines with equal splits refuse"
        )
    for r, c in enumerate(tried.load.replicas):
        if c.bound == "kv":
            out.append(
                f"KV room of replica {r} bounds it to {c.rows} rows ({problem.max_num_seqs} allowed): decode batches "
                "stay small"
            )
            break
    return out
