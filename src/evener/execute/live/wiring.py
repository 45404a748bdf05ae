"""Which groups and pipes a replica needs, derived from the plan alone: host and workers compute the same layout."""

from collections.abc import Callable

from evener.execute.live.runner import Wiring
from evener.execute.live.transport.base import Group, Pipe
from evener.execute.live.transport.layout import GroupSpec, PipeSpec, SegmentLayout
from evener.execute.live.transport.shm import Segment, ShmGroup, ShmPipe
from evener.ledger.spans import Op
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


def connect(
    segment: Segment | None,
    layout: SegmentLayout,
    replica: Replica,
    stage: int,
    rank: int,
    deadline: Seconds,
    spin: Seconds,
    wrap_group: Callable[[Group], Group],
    wrap_pipe: Callable[[Pipe, Op], Pipe],
) -> Wiring:
    """Open this rank's ends. `spin`: how long a wait may keep its core.

    `wrap_*` decorate them (slow-downs, spans); for a pipe with what receiving from it means, RECV or TOKENS.
    """
    here = replica.stages[stage].shards[rank].device
    first = {sh.device for sh in replica.stages[0].shards}
    last = stage == len(replica.stages) - 1
    group: Group | None = None
    x_in: Pipe | None = None
    tokens_in: Pipe | None = None
    x_out: list[Pipe] = []
    tokens_out: list[Pipe] = []
    if segment is not None:
        for region in layout.groups:
            if here in region.spec.devices:
                group = wrap_group(ShmGroup(segment, region, rank, deadline, spin))
        for pipe in layout.pipes:
            if here not in (pipe.spec.sender, pipe.spec.receiver):
                continue
            role = "send" if pipe.spec.sender == here else "recv"
            tokens = pipe.spec.receiver in first
            end = wrap_pipe(ShmPipe(segment, pipe, role, deadline, spin), Op.TOKENS if tokens else Op.RECV)
            if role == "send" and tokens and last:
                tokens_out.append(end)
            elif role == "send":
                x_out.append(end)
            elif tokens:
                tokens_in = end
            else:
                x_in = end
    return Wiring(group, x_in, x_out, tokens_in, tokens_out)
