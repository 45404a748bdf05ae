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
                split_even(model.ffn, n, model.ffn_unit),
                vocab if s == 0 else none,
                vocab if s == count - 1 else none,
                strict=True,
            )
            shards = tuple(Shard(sh.device, *p) for sh, p in zip(stage.shards, parts, strict=True))
            stages.append(Stage(layers, shards))
        replicas.append(Replica(tuple(stages), replica.role))
    return structs.replace(plan, replicas=tuple(replicas), name=f"{plan.name}, equal split")


def usual_plans(problem: Problem) -> Iterator[tuple[str, Plan | str]]:
    """(name, plan), or (name, why there is none): all TP, all PP, all DP over all devices, split equally."""
    n = len(problem.cluster.devices)
    if n == 1:
        return
    for name, sizes in (("all TP", (n, 1, 1)), ("all PP", (1, n, 1)), ("all DP", (1, 1, n))):
        try:
            yield f"{name}, equal", equal_plan(problem.model, problem.cluster.devices, *sizes)
        except InvalidPlan as error:
            yield f"{name}, equal", error.message


def score_usual(problem: Problem) -> list[tuple[str, Scored | str]]:
    """The usual plans, scored; or the reason why one cannot serve."""
    return [(name, p if isinstance(p, str) else score_or_reason(problem, p, name)) for name, p in usual_plans(problem)]


def score_or_reason(problem: Problem, plan: Plan, name: str) -> Scored | str:
    """The plan under this name, scored; or why it cannot serve."""
    try:
        return score(problem, structs.replace(plan, name=name))
    except InvalidPlan as error:
        return error.message
