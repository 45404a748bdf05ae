"""The usual choices that a plan is compared with: the layouts of pre-training over the same devices."""

from collections.abc import Iterator

from msgspec import structs

from evener.errors import InvalidPlan
from evener.plan.default import equal_plan
from evener.plan.problem import Problem
from evener.plan.search import Scored, score
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage, head_unit, split_even


def equalised(plan: Plan, model: ModelSpec) -> Plan:
    """The same devices in the same places, with equal layers, heads, columns and rows."""
    replicas = []
    for replica in plan.replicas:
        count = len(replica.stages)
        stages = []
        for s, (stage, layers) in enumerate(zip(replica.stages, split_even(model.layers, count), strict=True)):
            n = len(stage.shards)
            none = ((0, 0),) * n
            vocab = split_even(model.vocab, n)
            parts = zip(
                split_even(model.heads, n, head_unit(model)),
                split_even(model.ffn, n, model.quant_group),
                vocab if s == 0 else none,
                vocab if s == count - 1 else none,
                strict=True,
            )
            shards = tuple(Shard(sh.device, *p) for sh, p in zip(stage.shards, parts, strict=True))
            stages.append(Stage(layers, shards))
        replicas.append(Replica(tuple(stages), replica.role))
    return structs.replace(plan, replicas=tuple(replicas), name=f"{plan.name}, equal split")


def usual_plans(problem: Problem, chosen: Plan) -> Iterator[tuple[str, Plan | str]]:
    """(name, plan), or (name, why there is none): the chosen shape split equally, all TP, all PP, all DP."""
    model, devices = problem.model, problem.cluster.devices
    n = len(devices)
    if any(len(r.devices()) > 1 for r in chosen.replicas):
        yield "the same, split equally", equalised(chosen, model)
    if n == 1:
        return
    for name, sizes in (("all tensor parallel", (n, 1, 1)), ("all pipeline", (1, n, 1)), ("all replicas", (1, 1, n))):
        try:
            yield f"{name}, equal", equal_plan(model, devices, *sizes)
        except InvalidPlan as error:
            yield f"{name}, equal", error.message


def score_usual(problem: Problem, chosen: Plan) -> list[tuple[str, Scored | str]]:
    """The usual plans, scored; or the reason why one cannot serve."""
    out: list[tuple[str, Scored | str]] = []
    for name, plan in usual_plans(problem, chosen):
        if isinstance(plan, str):
            out.append((name, plan))
            continue
        try:
            out.append((name, score(problem, structs.replace(plan, name=name))))
        except InvalidPlan as error:
            out.append((name, error.message))
    return out
