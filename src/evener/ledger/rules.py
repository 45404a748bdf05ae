"""Rules of the verdict about single replicas and devices: each looks for one loss, its evidence and its remedy."""

from collections.abc import Iterator

from evener.ledger.account import Account, ReplicaAccount
from evener.ledger.causes import Cause
from evener.ledger.finding import (
    THRESHOLD,
    TOLD_SHORT,
    TOLD_UNATTRIBUTED,
    Finding,
    Hints,
    make_finding,
    replica_name,
    seconds_of,
    share_of,
)
from evener.units import human_bytes

# ---- who is not handed work -----------------------------------------------------------------------------------------


def kv(account: Account, hints: Hints) -> Iterator[Finding]:
    """Requests wait for KV blocks: devices idle, compute again, or run small batches."""
    for r, replica in account.replicas.items():
        if not _short_of_kv(replica):
            continue
        starved, again = seconds_of(replica, Cause.KV_STARVED), seconds_of(replica, Cause.RECOMPUTE)
        short, lost = _short_share(replica), starved + again
        waiting, tokens = replica.short_of_kv_requests, replica.short_of_kv_tokens
        evidence = (
            f"{waiting:.0f} requests of {tokens} tokens wait for KV blocks {short:.0%} of the time, while a decode "
            f"step has {replica.mean_decode_rows:.1f} rows"
        )
        if again > 0:
            evidence += f"; {again:.1f} s go into tokens computed a second time"
        if hints.max_num_seqs is not None and waiting > 0:
            slots = max(1.0, hints.max_num_seqs - replica.mean_decode_rows)
            tokens = round(tokens * min(1.0, slots / waiting))
        room = f"room for {max(tokens, 1)} more tokens and their answers"
        if hints.kv_bytes_per_token is not None:
            room += f" ({human_bytes(max(tokens, 1) * hints.kv_bytes_per_token)} and more, over the replica's devices)"
        remedy = f"raise --kv-cache-memory: {room}; or lower --max-num-seqs, so that fewer requests share it"
        cause = Cause.RECOMPUTE if again > starved else Cause.KV_STARVED
        yield make_finding(cause, replica_name(r), replica, lost, evidence, remedy)


def _short_share(replica: ReplicaAccount) -> float:
    """Of the time in which the replica was up."""
    up_s = (replica.wall_s - seconds_of(replica, Cause.DOWN)) / len(replica.devices)
    return replica.short_of_kv_s / up_s if up_s > 0 else 0.0


def _short_of_kv(replica: ReplicaAccount) -> bool:
    short, lost = _short_share(replica), seconds_of(replica, Cause.KV_STARVED) + seconds_of(replica, Cause.RECOMPUTE)
    return short >= TOLD_SHORT and (share_of(replica, lost) >= THRESHOLD or short >= 2 * THRESHOLD)


def imbalance(account: Account, hints: Hints) -> Iterator[Finding]:
    """Idle here, a queue elsewhere."""
    for r, replica in account.replicas.items():
        lost = seconds_of(replica, Cause.IMBALANCE)
        if share_of(replica, lost) >= THRESHOLD:
            busiest = min(account.replicas, key=lambda k: _idle(account, k))
            yield make_finding(
                Cause.IMBALANCE, replica_name(r), replica, lost,
                f"it idles {lost / len(replica.devices):.1f} s while requests queue elsewhere; replica {busiest} idles "
                f"{_idle(account, busiest):.0%}",
                "route by work left (--router least-work), which also moves waiting requests to idle replicas",
            )  # fmt: skip


def _idle(account: Account, replica: str) -> float:
    return account.replicas[replica].share(Cause.IMBALANCE, Cause.NO_DEMAND)


def contended(account: Account, hints: Hints) -> Iterator[Finding]:
    """Workers wait for their cores."""
    for name, device in account.devices.items():
        lost = seconds_of(device, Cause.CONTENDED)
        if share_of(device, lost) < THRESHOLD:
            continue
        core = name.split("#")[0]
        sharing = [n for n in account.devices if n != name and n.split("#")[0] == core]
        evidence = f"it had work and got no core for {lost:.1f} s, while it computed {device.compute_s:.1f} s"
        remedy = f"pin other processes elsewhere (taskset), or leave {core} to them and use another core"
        if sharing:
            evidence += f"; {', '.join(sharing)} runs on the same core"
            remedy = f"give {name} a core of its own, or plan with fewer workers"
        yield make_finding(Cause.CONTENDED, name, device, lost, evidence, remedy)


def host(account: Account, hints: Hints) -> Iterator[Finding]:
    """Work was ready and not handed over."""
    for r, replica in account.replicas.items():
        lost = seconds_of(replica, Cause.HOST)
        if share_of(replica, lost) >= THRESHOLD:
            batches = max(1, replica.batches // len(replica.devices))
            yield make_finding(
                Cause.HOST, replica_name(r), replica, lost,
                f"work was ready and not handed over, {lost / len(replica.devices) / batches * 1e3:.2f} ms in each of "
                f"{batches} batches",
                "keep a core free for the control process, or make batches larger (--max-num-seqs, "
                "--max-num-batched-tokens)",
            )  # fmt: skip


def held(account: Account, hints: Hints) -> Iterator[Finding]:
    """The policy waits."""
    for r, replica in account.replicas.items():
        lost = seconds_of(replica, Cause.HELD)
        if share_of(replica, lost) >= THRESHOLD:
            yield make_finding(
                Cause.HELD, replica_name(r), replica, lost,
                f"the policy makes requests wait {lost / len(replica.devices):.1f} s for batches to fill or to end",
                "let requests join running batches: --policy equal-time",
            )  # fmt: skip


# ---- computed in vain -----------------------------------------------------------------------------------------------


def computed_in_vain(account: Account, hints: Hints) -> Iterator[Finding]:
    """Padding, rows that had ended, tokens of lost replicas. (Recomputing after preemption is a matter of KV.)"""
    for r, replica in account.replicas.items():
        padding = seconds_of(replica, Cause.PADDING)
        if share_of(replica, padding) >= THRESHOLD:
            yield make_finding(
                Cause.PADDING, replica_name(r), replica, padding,
                f"{padding / replica.compute_s:.0%} of the compute is padding and rows that go on after their end",
                "batch continuously: --policy equal-time",
            )  # fmt: skip
        again = seconds_of(replica, Cause.RECOMPUTE)
        if share_of(replica, again) >= THRESHOLD and not _short_of_kv(replica):
            yield make_finding(
                Cause.RECOMPUTE, replica_name(r), replica, again,
                f"{again:.1f} s go into tokens computed a second time, and KV blocks were hardly ever short: requests "
                "came from another replica",
                "nothing, if a device was lost: this is the price of losing no request",
            )  # fmt: skip
        late = seconds_of(replica, Cause.SPECULATION)
        if share_of(replica, late) >= THRESHOLD:
            yield make_finding(
                Cause.SPECULATION, replica_name(r), replica, late,
                f"{late / replica.compute_s:.0%} of the compute is for rows whose end was known one step too late "
                f"({replica.mean_decode_rows:.1f} rows per step)",
                "answers are very short: cap them with max_tokens, whose end is known in advance, or use fewer stages",
            )  # fmt: skip


# ---- the rest -------------------------------------------------------------------------------------------------------


def down(account: Account, hints: Hints) -> Iterator[Finding]:
    """Loading, lost, replanning."""
    for r, replica in account.replicas.items():
        lost = seconds_of(replica, Cause.DOWN)
        share, loading = replica.share(Cause.DOWN), min(lost, replica.loading_s * len(replica.devices))
        later = (lost - loading) / replica.wall_s if replica.wall_s else 0.0
        if share < THRESHOLD or (replica.down is None and later < THRESHOLD and share < 0.5):
            continue  # loading at the start is told only where it is most of the window
        why = replica.down or f"it was {'lost' if lost > 2 * loading else 'loading'}, and is up now"
        yield Finding(
            cause=Cause.DOWN.label, where=replica_name(r), share=share, lost_s=lost,
            evidence=f"down for {lost / len(replica.devices):.1f} s: {why}",
            remedy="restart the server without the lost device" if replica.down else "look at a later window",
        )  # fmt: skip


def migration(account: Account, hints: Hints) -> Iterator[Finding]:
    """KV or weights on the move."""
    for r, replica in account.replicas.items():
        lost = seconds_of(replica, Cause.MIGRATION)
        if share_of(replica, lost) >= THRESHOLD:
            yield make_finding(
                Cause.MIGRATION, replica_name(r), replica, lost, f"its devices move KV or weights for {lost:.1f} s",
                "change the plan less often, or use a faster link",
            )  # fmt: skip


def unattributed(account: Account, hints: Hints) -> Iterator[Finding]:
    """The ledger's own error."""
    for name, device in account.devices.items():
        lost = seconds_of(device, Cause.UNATTRIBUTED)
        if device.wall_s and lost / device.wall_s >= TOLD_UNATTRIBUTED:
            yield make_finding(
                Cause.UNATTRIBUTED, name, device, lost, f"{lost:.1f} s have no evidence for any cause",
                "take the other shares of this device with that much care, and report it as a defect of Evener",
            )  # fmt: skip
