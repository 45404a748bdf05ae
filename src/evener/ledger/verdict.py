"""The account in plain words: what is lost, on whom it falls, what shows it, and what to do about it.

Every rule needs positive evidence and a loss above `THRESHOLD` of the time in which its devices had something to do.
"""

from msgspec import Struct

from evener.ledger import rules, rules_peers
from evener.ledger.account import Account
from evener.ledger.causes import Cause
from evener.ledger.finding import MOST_ROOM, ROOM, THRESHOLD, Finding, Hints, asked, busy_share

__all__ = ["THRESHOLD", "Finding", "Hints", "Verdict", "verdict"]

_RULES = (
    rules.down,
    rules_peers.straggler,
    rules_peers.bubble,
    rules.kv,
    rules.imbalance,
    rules.contended,
    rules.host,
    rules_peers.transfer,
    rules.computed_in_vain,
    rules.held,
    rules.migration,
    rules.unattributed,
)


class Verdict(Struct, frozen=True, kw_only=True):
    """Findings, the largest loss first, and what bounds the deployment."""

    findings: tuple[Finding, ...]
    bound: str
    """What the devices' useful time says, and how much room there is."""

    def text(self) -> list[str]:
        """One sentence or two per line."""
        lines = [finding.text for finding in self.findings]
        return [*(lines or ["Nothing large is lost."]), self.bound]


def verdict(account: Account, hints: Hints | None = None) -> Verdict:
    """What an account says. `hints`: what the ledger cannot know and a remedy may name."""
    found = [finding for rule in _RULES for finding in rule(account, hints or Hints())]
    found.sort(key=lambda f: (-f.lost_s, f.cause, f.where))
    return Verdict(findings=tuple(found), bound=_bound(account))


def _bound(account: Account) -> str:
    """Room for more traffic, or what a device-second buys."""
    total = account.total
    if not total.wall_ns:
        if account.since_s > 0.0:
            return "Nothing of this window is accounted for yet: a batch that began before it still runs."
        return "Nothing is recorded yet."
    running = [r for r in account.replicas.values() if asked(r) > 0]
    if not running:
        open_ = [name for name, d in account.devices.items() if d.wall_s < account.window_s - 1e-9]
        if open_:
            return f"Nothing of this window is accounted for yet on {', '.join(open_)}: a batch still runs there."
        if down := total.causes_ns[Cause.DOWN]:  # whatever was asked for then was refused, and is not known here
            return (
                f"Nothing was computed in {account.window_s:.0f} s, {down / total.wall_ns:.0%} of it loading or down."
            )
        return f"Nothing was asked for in {account.window_s:.0f} s."
    useful = sum(r.useful * r.wall_s for r in running) / sum(asked(r) for r in running)
    text = f"While there was work, devices computed usefully for {useful:.0%} of it"
    if total.achieved_over_peak is not None:
        text += f", at {total.achieved_over_peak:.0%} of their peak"
    # The busiest replica fills up first.
    busy = max(busy_share(r) for r in running)
    if busy <= 1 - ROOM:
        return f"{text}. There is room for at least {min(MOST_ROOM, 1 / busy):.1f} times the traffic."
    what = "faster devices or more replicas" if useful > 0.8 else "what is listed above"
    return f"{text}. The busiest replica idles {1 - busy:.0%}: for more throughput, {what}."
