"""The rules of the verdict: each looks for one loss in an account and says whose, by what evidence, and the remedy."""

from collections.abc import Iterator

from msgspec import Struct

from evener.ledger.account import Account, DeviceAccount, StageAccount, Use
from evener.ledger.causes import Cause
from evener.spec.plan import size, split_by_weight
from evener.units import human_bytes

THRESHOLD = 0.05
"""Of the time with something to do; smaller losses are not told."""
TOLD_UNATTRIBUTED = 0.01
ROOM = 0.1
"""Idle shares below are no room."""
UNEVEN = 0.5
"""Batches whose standard deviation is this part of their mean fill a pipeline badly."""
LATER = 1.05
"""Ranks and stages within this ratio take equally long."""

_COLUMNS = 64
"""FFN columns are split in multiples of this, which suits every quantisation group."""


class Hints(Struct, frozen=True):
    """What the ledger cannot know."""

    kv_bytes_per_token: int | None = None
    """Over all layers and heads, to say memory in bytes."""


class Finding(Struct, frozen=True, kw_only=True):
    """One loss."""

    cause: str
    """Label of the cause."""
    where: str
    """`cpu:1`, `stage 1 of replica 0`, `replica 0`."""
    share: float
    """Of the time in which the devices there had something to do."""
    lost_s: float
    """Device-seconds."""
    evidence: str
    remedy: str

    @property
    def text(self) -> str:
        """`stage 1 of replica 0 loses 31% (bubble): ...`."""
        return f"{self.where} loses {self.share:.0%} ({self.cause}): {self.evidence}. Remedy: {self.remedy}."


def asked(use: Use) -> float:
    """Device-seconds in which there was something to do."""
    return use.wall_s - use.causes[Cause.NO_DEMAND.label] - use.causes[Cause.DOWN.label]


def idle_share(use: Use) -> float:
    """Nothing to do, of the time that the devices were up."""
    up = use.wall_s - use.causes[Cause.DOWN.label]
    return use.causes[Cause.NO_DEMAND.label] / up if up > 0 else 0.0


def _s(use: Use, *causes: Cause) -> float:
    return sum(use.causes[c.label] for c in causes)


def _share(use: Use, seconds: float) -> float:
    whole = asked(use)
    return seconds / whole if whole > 0 else 0.0


def _replica(index: str) -> str:
    return f"replica {index}"


def _stage(stage: StageAccount) -> str:
    return f"stage {stage.stage} of replica {stage.replica}"


def _finding(cause: Cause, where: str, use: Use, lost_s: float, evidence: str, remedy: str) -> Finding:
    share = _share(use, lost_s)
    return Finding(cause=cause.label, where=where, share=share, lost_s=lost_s, evidence=evidence, remedy=remedy)


# ---- waiting for others ---------------------------------------------------------------------------------------------


def straggler(account: Account, hints: Hints) -> Iterator[Finding]:
    """Ranks of a stage wait for a slower one."""
    for stage in account.stages.values():
        lost = _s(stage, Cause.STRAGGLER)
        if len(stage.devices) < 2 or _share(stage, lost) < THRESHOLD:
            continue
        ranks = [account.devices[name] for name in stage.devices]
        names = dict(zip(stage.devices, ranks, strict=True))
        late = max(names, key=lambda n: names[n].compute_s + _s(names[n], Cause.CONTENDED))
        waits = max(names, key=lambda n: _s(names[n], Cause.STRAGGLER))
        more_compute = names[late].compute_s - names[waits].compute_s
        more_contended = _s(names[late], Cause.CONTENDED) - _s(names[waits], Cause.CONTENDED)
        waited = f"{waits} waits {_s(names[waits], Cause.STRAGGLER):.1f} s in collectives"
        if late == waits or more_compute + more_contended < lost / (2 * len(ranks)):
            yield _finding(
                Cause.STRAGGLER, _stage(stage), stage, lost, f"{waited}, but no rank computes longer: they are late "
                "in turns", "give each worker a core of its own, or use fewer tensor-parallel ranks",
            )  # fmt: skip
        elif more_contended > more_compute:
            yield _finding(
                Cause.STRAGGLER, _stage(stage), stage, lost,
                f"{waited} for {late}, which was descheduled for {_s(names[late], Cause.CONTENDED):.1f} s",
                f"keep other processes off the cores of {late}",
            )  # fmt: skip
        else:
            yield _finding(
                Cause.STRAGGLER, _stage(stage), stage, lost,
                f"{waited} for {late}, which computes {names[late].compute_s:.1f} s where {waits} computes "
                f"{names[waits].compute_s:.1f} s", _resplit(ranks, late),
            )  # fmt: skip


def _resplit(ranks: list[DeviceAccount], late: str) -> str:
    """Heads and columns in proportion to what each rank computes in a second."""
    heads, ffn = sum(r.heads for r in ranks), sum(r.ffn for r in ranks)
    part = [r.heads / max(1, heads) + r.ffn / max(1, ffn) for r in ranks]
    speeds = [p / r.compute_s if r.compute_s else 0.0 for p, r in zip(part, ranks, strict=True)]
    slow = min(range(len(ranks)), key=lambda k: speeds[k])
    others = "the other" if len(ranks) == 2 else "the others"
    new_heads = size(split_by_weight(heads, speeds)[slow]) if heads else 0
    new_ffn = size(split_by_weight(ffn, speeds, _COLUMNS if ffn % _COLUMNS == 0 else 1)[slow]) if ffn else 0
    if new_heads == ranks[slow].heads and abs(new_ffn - ranks[slow].ffn) * 100 < ffn:
        return f"{late} arrives late although heads are split by speed: use fewer tensor-parallel ranks"
    return (
        f"{late} arrives late: give it {new_heads} of {heads} heads and {new_ffn} of {ffn} FFN columns, {others} more"
    )


def bubble(account: Account, hints: Hints) -> Iterator[Finding]:
    """Stages wait for other stages of their replica."""
    for r, replica in account.replicas.items():
        stages = [s for s in account.stages.values() if str(s.replica) == r]
        lost = _s(replica, Cause.BUBBLE)
        if len(stages) < 2 or _share(replica, lost) < THRESHOLD:
            continue
        busy = [s.busy_s / len(s.devices) for s in stages]
        slow, idle = busy.index(max(busy)), busy.index(min(busy))
        waits = max(stages, key=lambda s: _share(s, _s(s, Cause.BUBBLE)))
        share = _share(waits, _s(waits, Cause.BUBBLE))
        layers = 0
        if busy[slow] > LATER * busy[idle]:
            per_layer = busy[slow] / stages[slow].layers + busy[idle] / stages[idle].layers
            layers = min(stages[slow].layers - 1, round((busy[slow] - busy[idle]) / per_layer))
        both = f"stage {slow} is busy {busy[slow]:.1f} s, stage {idle} {busy[idle]:.1f} s"
        # What the longest stage imposes on the others; the rest is a pipeline that is not full.
        imposed = sum((max(busy) - b) * len(s.devices) for b, s in zip(busy, stages, strict=True))
        if layers and imposed >= lost / 2:
            yield _finding(
                Cause.BUBBLE, _replica(r), replica, lost,
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
            yield _finding(
                Cause.BUBBLE, _replica(r), replica, lost,
                f"stage {waits.stage} waits {share:.0%} of the time; {both}, {why}", also + remedy,
            )  # fmt: skip


def transfer(account: Account, hints: Hints) -> Iterator[Finding]:
    """Ranks move data after all have arrived."""
    for stage in account.stages.values():
        lost = _s(stage, Cause.TRANSFER)
        if _share(stage, lost) < THRESHOLD:
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
        yield _finding(Cause.TRANSFER, _stage(stage), stage, lost, evidence, remedy)


# ---- who is not handed work -----------------------------------------------------------------------------------------


def kv(account: Account, hints: Hints) -> Iterator[Finding]:
    """Requests wait for KV blocks: devices idle, compute again, or run small batches."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.KV_STARVED, Cause.RECOMPUTE)
        devices = len(replica.devices)
        short = replica.short_of_kv_s * devices / replica.wall_s if replica.wall_s else 0.0
        if _share(replica, lost) < THRESHOLD and short < 2 * THRESHOLD:
            continue
        tokens = replica.short_of_kv_tokens
        evidence = (
            f"requests wait for KV blocks {short:.0%} of the time, {tokens} tokens of them on average, while a decode "
            f"step has {replica.mean_decode_rows:.1f} rows"
        )
        again = _s(replica, Cause.RECOMPUTE)
        if again > 0:
            evidence += f"; {again:.1f} s go into tokens computed a second time"
        room = f"room for {max(tokens, 1)} more tokens"
        if hints.kv_bytes_per_token is not None:
            room += f" ({human_bytes(max(tokens, 1) * hints.kv_bytes_per_token)} over the replica's devices)"
        remedy = f"raise --kv-cache-memory: {room}; or lower --max-num-seqs, so that fewer requests share it"
        cause = Cause.RECOMPUTE if again > _s(replica, Cause.KV_STARVED) else Cause.KV_STARVED
        yield _finding(cause, _replica(r), replica, lost, evidence, remedy)


def imbalance(account: Account, hints: Hints) -> Iterator[Finding]:
    """Idle here, a queue elsewhere."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.IMBALANCE)
        if _share(replica, lost) >= THRESHOLD:
            busiest = min(account.replicas, key=lambda k: _idle(account, k))
            yield _finding(
                Cause.IMBALANCE, _replica(r), replica, lost,
                f"it idles {lost / len(replica.devices):.1f} s while requests queue elsewhere; replica {busiest} idles "
                f"{_idle(account, busiest):.0%}",
                "route by work left (--router least-work), which also moves waiting requests to idle replicas",
            )  # fmt: skip


def _idle(account: Account, replica: str) -> float:
    return account.replicas[replica].share(Cause.IMBALANCE, Cause.NO_DEMAND)


def contended(account: Account, hints: Hints) -> Iterator[Finding]:
    """Workers wait for their cores."""
    for name, device in account.devices.items():
        lost = _s(device, Cause.CONTENDED)
        if _share(device, lost) < THRESHOLD:
            continue
        core = name.split("#")[0]
        sharing = [n for n in account.devices if n != name and n.split("#")[0] == core]
        evidence = f"it had work and got no core for {lost:.1f} s, while it computed {device.compute_s:.1f} s"
        remedy = f"pin other processes elsewhere (taskset), or leave {core} to them and use another core"
        if sharing:
            evidence += f"; {', '.join(sharing)} runs on the same core"
            remedy = f"give {name} a core of its own, or plan with fewer workers"
        yield _finding(Cause.CONTENDED, name, device, lost, evidence, remedy)


def host(account: Account, hints: Hints) -> Iterator[Finding]:
    """Work was ready and not handed over."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.HOST)
        if _share(replica, lost) >= THRESHOLD:
            batches = max(1, replica.batches // len(replica.devices))
            yield _finding(
                Cause.HOST, _replica(r), replica, lost,
                f"work was ready and not handed over, {lost / len(replica.devices) / batches * 1e3:.2f} ms in each of "
                f"{batches} batches",
                "keep a core free for the control process, or make batches larger (--max-num-seqs, "
                "--max-num-batched-tokens)",
            )  # fmt: skip


def held(account: Account, hints: Hints) -> Iterator[Finding]:
    """The policy waits."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.HELD)
        if _share(replica, lost) >= THRESHOLD:
            yield _finding(
                Cause.HELD, _replica(r), replica, lost,
                f"the policy makes requests wait {lost / len(replica.devices):.1f} s for batches to fill or to end",
                "let requests join running batches: --policy equal-time",
            )  # fmt: skip


# ---- computed in vain -----------------------------------------------------------------------------------------------


def computed_in_vain(account: Account, hints: Hints) -> Iterator[Finding]:
    """Padding and rows that had ended. (Recomputed tokens are a matter of KV.)"""
    for r, replica in account.replicas.items():
        padding = _s(replica, Cause.PADDING)
        if _share(replica, padding) >= THRESHOLD:
            yield _finding(
                Cause.PADDING, _replica(r), replica, padding,
                f"{padding / replica.compute_s:.0%} of the compute is padding and rows that go on after their end",
                "batch continuously: --policy equal-time",
            )  # fmt: skip
        late = _s(replica, Cause.SPECULATION)
        if _share(replica, late) >= THRESHOLD:
            yield _finding(
                Cause.SPECULATION, _replica(r), replica, late,
                f"{late / replica.compute_s:.0%} of the compute is for rows whose end was known one step too late "
                f"({replica.mean_decode_rows:.1f} rows per step)",
                "answers are very short: cap them with max_tokens, whose end is known in advance, or use fewer stages",
            )  # fmt: skip


# ---- the rest -------------------------------------------------------------------------------------------------------


def down(account: Account, hints: Hints) -> Iterator[Finding]:
    """Loading, lost, replanning."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.DOWN)
        share = replica.share(Cause.DOWN)
        if share < THRESHOLD or (replica.down is None and account.since_s == 0.0 and share < 0.5):
            continue  # loading at the start is told only where it is most of the window
        why = replica.down or "it was loading or lost, and is up now"
        yield Finding(
            cause=Cause.DOWN.label, where=_replica(r), share=share, lost_s=lost,
            evidence=f"down for {lost / len(replica.devices):.1f} s: {why}",
            remedy="restart the server without the lost device" if replica.down else "look at a later window",
        )  # fmt: skip


def migration(account: Account, hints: Hints) -> Iterator[Finding]:
    """KV or weights on the move."""
    for r, replica in account.replicas.items():
        lost = _s(replica, Cause.MIGRATION)
        if _share(replica, lost) >= THRESHOLD:
            yield _finding(
                Cause.MIGRATION, _replica(r), replica, lost, f"its devices move KV or weights for {lost:.1f} s",
                "change the plan less often, or use a faster link",
            )  # fmt: skip


def unattributed(account: Account, hints: Hints) -> Iterator[Finding]:
    """The ledger's own error."""
    for name, device in account.devices.items():
        lost = _s(device, Cause.UNATTRIBUTED)
        if device.wall_s and lost / device.wall_s >= TOLD_UNATTRIBUTED:
            yield _finding(
                Cause.UNATTRIBUTED, name, device, lost, f"{lost:.1f} s have no evidence for any cause",
                "take the other shares of this device with that much care, and report it as a defect of Evener",
            )  # fmt: skip
