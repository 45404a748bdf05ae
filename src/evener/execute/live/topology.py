"""Which groups and pipes a replica needs, derived from the plan alone: host and workers compute the same layout."""

from evener.execute.live.transport.layout import GroupSpec, PipeSpec, SegmentLayout
from evener.spec.cluster import Link
from evener.spec.plan import Replica
from evener.units import Bytes, Seconds

_TOKEN_RING = Bytes(1 << 16)
"""Sampled tokens of far more batches than are ever in flight."""


def _link(links: tuple[Link, ...], a: str, b: str) -> tuple[Seconds, float | None]:
    for link in links:
        if {link.a, link.b} == {a, b}:
            return link.delay, link.bandwidth
    return Seconds(0.0), None


def _worst(links: tuple[Link, ...], devices: tuple[str, ...]) -> tuple[Seconds, float | None]:
    inside = [_link(links, a, b) for i, a in enumerate(devices) for b in devices[i + 1 :]]
    rates = [rate for _, rate in inside if rate is not None]
    return max((delay for delay, _ in inside), default=Seconds(0.0)), min(rates, default=None)


def layout_of(replica: Replica, links: tuple[Link, ...], hidden: int, max_batch_tokens: int) -> SegmentLayout:
    """One group per stage of several shards; pipes for activations between stages; pipes for sampled tokens back.

    A receiving rank has one sender, rank `j % senders` of the stage before, so that sending is shared out.
    """
    groups = []
    for stage in replica.stages:
        names = tuple(sh.device for sh in stage.shards)
        if len(names) > 1:
            delay, bandwidth = _worst(links, names)
            groups.append(GroupSpec(names, delay=delay, bandwidth=bandwidth))
    # Two whole batches of activations fit, so that a stage need not wait for the next one to take them.
    message = 4 * hidden * max_batch_tokens + 64
    ring = Bytes(max(1 << 16, -(-2 * message // 4096) * 4096))
    pipes = []
    for before, after in zip(replica.stages, replica.stages[1:], strict=False):
        for j, receiver in enumerate(after.shards):
            sender = before.shards[j % len(before.shards)].device
            delay, bandwidth = _link(links, sender, receiver.device)
            pipes.append(PipeSpec(sender, receiver.device, ring, delay, bandwidth))
    if len(replica.stages) > 1:
        sampler = replica.stages[-1].shards[0].device
        for shard in replica.stages[0].shards:
            delay, bandwidth = _link(links, sampler, shard.device)
            pipes.append(PipeSpec(sampler, shard.device, _TOKEN_RING, delay, bandwidth))
    return SegmentLayout.plan(groups, pipes)
