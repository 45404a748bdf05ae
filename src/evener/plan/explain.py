"""Says in words why a plan was chosen: against the usual layouts, what binds it, what a further device would bring."""

from collections.abc import Sequence

from evener.plan.backtests import error_bar
from evener.plan.more import Gain
from evener.plan.planner import Choice
from evener.plan.problem import Problem
from evener.plan.trial import Tried
from evener.spec.plan import Plan, size
from evener.units import human_bytes


def headline(choice: Choice) -> str:
    """What was chosen and why, in one line."""
    best = choice.best
    count = len(best.plan.devices())
    line = f"plan {best.plan.name} on {count} device{'s' if count > 1 else ''}: {_merit(choice, best)}"
    rivals = [b for b in choice.baselines if b.tried is not None and b.tried is not best]
    if rivals:
        nearest = max(rivals, key=lambda b: _value(choice, b.tried) if b.tried else 0.0)
        assert nearest.tried is not None
        line += f"; {nearest.name}: {_merit(choice, nearest.tried)}"
    return line


def _value(choice: Choice, t: Tried) -> float:
    if choice.goal == "goodput":
        return t.goodput
    return -t.e2e.mean if choice.goal.startswith("latency") else _throughput(choice, t)


def _throughput(choice: Choice, t: Tried) -> float:
    return t.tokens_s if choice.finite else t.full_tokens_s


def _merit(choice: Choice, t: Tried) -> str:
    if choice.goal == "goodput":
        return f"{t.goodput:.3g} requests/s within the objective ({t.met:.0%} of them)"
    if choice.goal.startswith("latency"):
        return f"{t.e2e.mean:.3g} s per request on average, capacity {t.load.tokens_s:.4g} tokens/s"
    return f"{_throughput(choice, t):.4g} tokens/s"


def against(choice: Choice) -> list[str]:
    """The chosen plan beside each of the usual layouts."""
    out = []
    for b in choice.baselines:
        if b.tried is None:
            out.append(f"{b.name}: cannot serve this ({b.reason})")
        elif b.tried is choice.best:
            out.append(f"{b.name}: is the choice")
        else:
            faster = choice.best.load.tokens_s / b.tried.load.tokens_s
            sooner = b.tried.e2e.mean / choice.best.e2e.mean
            out.append(
                f"{b.name}: the choice has {faster:.2f} times its capacity and {1 / sooner:.2f} times its mean time"
            )
    return out


def binding(problem: Problem, plan: Plan, tried: Tried) -> list[str]:
    """What keeps each replica from more: the pace of a stage, and what bounds the rows that share a step."""
    out = []
    for r, (replica, c) in enumerate(zip(plan.replicas, tried.load.replicas, strict=True)):
        where = f"replica {r}" if len(plan.replicas) > 1 else "the replica"
        text = {
            "kv": f"KV room for {c.rows} rows of {problem.demand.kv_tokens():.0f} tokens "
            f"({c.blocks} blocks; --max-num-seqs would allow {problem.max_num_seqs})",
            "rows": f"--max-num-seqs {problem.max_num_seqs}: KV room would hold more",
            "prompts": "prompts: each batch carries as many prompt tokens as its time allows, so compute binds",
        }[c.bound]
        line = f"{where} serves {c.tokens_s:.4g} tokens/s, bound by {text}"
        if len(replica.stages) > 1:
            stage = replica.stages[c.slowest]
            names = "+".join(sh.device for sh in stage.shards)
            mean = sum(c.stage_ns) / len(c.stage_ns)
            line += (
                f"; stage {c.slowest} ({names}, {size(stage.layers)} layers) sets the pace at "
                f"{c.stage_ns[c.slowest] / 1e6:.3g} ms, the stages take {mean / 1e6:.3g} ms on average"
            )
        out.append(line)
    left = [d.name for d in problem.cluster.devices if d.name not in set(plan.devices())]
    if left:
        out.append(f"left out, as they would only slow the others: {', '.join(left)}")
    return out


def gains(found: Sequence[Gain]) -> list[str]:
    """What one device more of each kind brings."""
    return [
        f"one more like {g.like} (there {'is' if g.count == 1 else 'are'} {g.count}): "
        + (f"capacity x {g.ratio:.2f} ({g.plan})" if g.ratio > 1.005 else "no gain")
        for g in found
    ]


def error_line(problem: Problem) -> str:
    """How far predictions on these devices in these dtypes were off, or that they were never compared."""
    if any(d.host != "localhost" for d in problem.cluster.devices):
        return "Error: never back-tested here (devices of other hosts)"
    memory = problem.memory
    bar = error_bar(problem.model, tuple(d.name for d in problem.cluster.devices), memory.dtype, memory.kv_dtype)
    formats = f"{memory.dtype} with {memory.kv_dtype} KV"
    if bar is None:
        return f"Error: never back-tested here in {formats}"
    return (
        f"Error: throughput was predicted {bar.count} times for this model in {formats} on these devices, off by "
        f"{bar.median:.0%} in the median, {bar.greatest:.0%} at most"
    )


def memory_line(problem: Problem, tried: Tried) -> str:
    """Bytes of weights, and tokens of KV."""
    return (
        f"{human_bytes(tried.memory)} of {problem.memory.dtype} weights over the devices, "
        f"{tried.kv_tokens} tokens of {problem.memory.kv_dtype} KV"
    )
