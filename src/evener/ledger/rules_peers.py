"""Rules of the verdict about devices that wait for each other: ranks, stages, links."""

from collections.abc import Iterator

from evener.ledger.account import Account, DeviceAccount
from evener.ledger.causes import Cause
from evener.ledger.finding import (
    LATER,
    THRESHOLD,
    UNEVEN,
    Finding,
    Hints,
    make_finding,
    replica_name,
    seconds_of,
    share_of,
    stage_name,
)
from evener.spec.model import QUANT_GROUP, ffn_group
from evener.spec.plan import size, split_by_weight
from evener.units import human_bytes


def straggler(account: Account, hints: Hints) -> Iterator[Finding]:
    """Ranks of a stage wait for a slower one."""
    for stage in account.stages.values():
        lost = seconds_of(stage, Cause.STRAGGLER)
        if len(stage.devices) < 2 or share_of(stage, lost) < THRESHOLD:
            continue
        ranks = [account.devices[name] for name in stage.devices]
        names = dict(zip(stage.devices, ranks, strict=True))
        late = max(names, key=lambda n: names[n].compute_s + seconds_of(names[n], Cause.CONTENDED))
        waits = max(names, key=lambda n: seconds_of(names[n], Cause.STRAGGLER))
        more_compute = names[late].compute_s - names[waits].compute_s
        more_contended = seconds_of(names[late], Cause.CONTENDED) - seconds_of(names[waits], Cause.CONTENDED)
        waited = f"{waits} waits {seconds_of(names[waits], Cause.STRAGGLER):.1f} s in collectives"
        if late == waits or more_compute + more_contended < lost / (2 * len(ranks)):
            yield make_finding(
                Cause.STRAGGLER, stage_name(stage), stage, lost,
                f"{waited}, but no rank computes longer: they are late in turns",
                "give each worker a core of its own, or use fewer tensor-parallel ranks",
            )  # fmt: skip
        elif more_contended > more_compute:
            yield make_finding(
                Cause.STRAGGLER, stage_name(stage), stage, lost,
                f"{waited} for {late}, which was descheduled for {seconds_of(names[late], Cause.CONTENDED):.1f} s",
                f"keep other processes off the cores of {late}",
            )  # fmt: skip
        else:
            yield make_finding(
                Cause.STRAGGLER, stage_name(stage), stage, lost,
                f"{waited} for {late}, which computes {names[late].compute_s:.1f} s where {waits} computes "
                f"{names[waits].compute_s:.1f} s", _resplit(ranks, late, stage.devices.index(late)),
            )  # fmt: skip


def _resplit(ranks: list[DeviceAccount], late: str, at: int) -> str:
    """Heads and columns in proportion to what each rank computes in a second; `at`: the rank that is late."""
    heads, ffn = sum(r.heads for r in ranks), sum(r.ffn for r in ranks)
    part = [r.heads / max(1, heads) + r.ffn / max(1, ffn) for r in ranks]
    speeds = [p / r.compute_s if r.compute_s else 0.0 for p, r in zip(part, ranks, strict=True)]
    others = "the other" if len(ranks) == 2 else "the others"
    new_heads = size(split_by_weight(heads, speeds)[at]) if heads else 0
    unit = ffn_group(ffn) if ffn % QUANT_GROUP == 0 else 1  # legal in every dtype
    new_ffn = size(split_by_weight(ffn, speeds, unit)[at]) if ffn else 0
    if new_heads == ranks[at].heads and abs(new_ffn - ranks[at].ffn) * 100 < ffn:
        return f"{late} arrives late although heads are split by speed: use fewer tensor-parallel ranks"
    return (
        f"{late} arrives late: give it {new_heads} of {heads} heads and {new_ffn} of {ffn} FFN columns, {others} more"
    )


def bubble(account: Account, hints: Hints) -> Iterator[Finding]:
    """Stages wait for other stages of their replica."""
    for r, replica in account.replicas.items():
        stages = [s for s in account.stages.values() if str(s.replica) == r]
        lost = seconds_of(replica, Cause.BUBBLE)
        if len(stages) < 2 or share_of(replica, lost) < THRESHOLD:
            continue
        busy = [s.busy_s / len(s.devices) for s in stages]
        slow, idle = busy.index(max(busy)), busy.index(min(busy))
        waits = max(stages, key=lambda s: share_of(s, seconds_of(s, Cause.BUBBLE)))
        share = share_of(waits, seconds_of(waits, Cause.BUBBLE))
        layers = 0
        if busy[slow] > LATER * busy[idle]:
            per_layer = busy[slow] / stages[slow].layers + busy[idle] / stages[idle].layers
            layers = min(stages[slow].layers - 1, round((busy[slow] - busy[idle]) / per_layer))
        both = f"stage {slow} is busy {busy[slow]:.1f} s, stage {idle} {busy[idle]:.1f} s"
        # What the longest stage imposes on the others; the rest is a pipeline that is not full.
        imposed = sum((max(busy) - b) * len(s.devices) for b, s in zip(busy, stages, strict=True))
        if layers and imposed >= lost / 2:
            yield make_finding(
                Cause.BUBBLE, replica_name(r), replica, lost,
                f"stage {waits.stage} waits {share:.0%} of the time for stage {slow}; {both}",
                f"move {layers} layer{'s' * (layers > 1)} from stage {slow} to stage {idle}",
            )  # fmt: skip
        else:
            uneven = stages[slow].batch_std_s > UNEVEN * stages[slow].batch_s
            batches = f"batches take {stages[slow].batch_s * 1e3:.0f} +- {stages[slow].batch_std_s * 1e3:.0f} ms there"
            why, remedy = (
                (f"and {batches}: a short one waits behind a long one", "make prompt chunks smaller "
                 "(--max-num-batched-tokens), or use fewer stages and more replicas")
                if uneven
                else (f"and {batches}: too few are in flight for {len(stages)} stages "
                      f"({replica.mean_decode_rows:.1f} rows per decode step)",
                      "send more requests at a time, or use fewer stages and more replicas")
            )  # fmt: skip
            also = f"move {layers} layer{'s' * (layers > 1)} from stage {slow} to stage {idle}; " if layers else ""
            yield make_finding(
                Cause.BUBBLE, replica_name(r), replica, lost,
                f"stage {waits.stage} waits {share:.0%} of the time; {both}, {why}", also + remedy,
            )  # fmt: skip


def transfer(account: Account, hints: Hints) -> Iterator[Finding]:
    """Ranks move data after all have arrived."""
    for stage in account.stages.values():
        lost = seconds_of(stage, Cause.TRANSFER)
        if share_of(stage, lost) < THRESHOLD:
            continue
        links = [x for x in account.links if (x.replica, x.stage) == (stage.replica, stage.stage)]
        evidence = f"its devices move data for {lost:.1f} s"
        collective = len(stage.devices) > 1
        if links:
            by_op = {x.op: sum(y.moving_s for y in links if y.op == x.op) for x in links}
            op = max(by_op, key=lambda o: by_op[o])
            of_op = [x for x in links if x.op == op]
            count, nbytes = sum(x.count for x in of_op), sum(x.nbytes for x in of_op)
            most = max(of_op, key=lambda x: x.moving_s)
            evidence = (
                f"{op} takes {by_op[op]:.1f} s of it, {by_op[op] / count * 1e6:.0f} us each for "
                f"{human_bytes(nbytes / count)}; {most.moving_s / by_op[op]:.0%} of that in batches of {most.rows} rows"
            )
            collective = op in ("all_reduce", "all_gather", "all_to_all")
        fewer = f"use fewer tensor-parallel ranks than {len(stage.devices)}, and more stages or replicas instead"
        remedy = fewer if collective else "use a faster link between the stages, or fewer stages"
        yield make_finding(Cause.TRANSFER, stage_name(stage), stage, lost, evidence, remedy)
