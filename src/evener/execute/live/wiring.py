"""Opens the groups and pipes that one rank of a replica needs."""

from collections.abc import Callable

from evener.execute.live.runner import Wiring
from evener.execute.live.transport.base import Group, Pipe
from evener.execute.live.transport.layout import SegmentLayout
from evener.execute.live.transport.pace import Pace
from evener.execute.live.transport.segment import Segment
from evener.execute.live.transport.shm import ShmGroup, ShmPipe
from evener.ledger.spans import Op
from evener.spec.plan import Replica
from evener.units import Seconds


def connect(
    segment: Segment | None,
    layout: SegmentLayout,
    replica: Replica,
    stage: int,
    rank: int,
    deadline: Seconds,
    spin: Seconds,
    pace: Pace,
    wrap_group: Callable[[Group], Group],
    wrap_pipe: Callable[[Pipe, Op], Pipe],
) -> Wiring:
    """Open this rank's ends. `spin`: how long a wait may keep its core. `pace`: of its device.

    `wrap_*` decorate them (spans); for a pipe with what receiving from it means, RECV or TOKENS.
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
                group = wrap_group(ShmGroup(segment, region, rank, deadline, spin, pace))
        for pipe in layout.pipes:
            if here not in (pipe.spec.sender, pipe.spec.receiver):
                continue
            role = "send" if pipe.spec.sender == here else "recv"
            tokens = pipe.spec.receiver in first
            end = wrap_pipe(ShmPipe(segment, pipe, role, deadline, spin, pace), Op.TOKENS if tokens else Op.RECV)
            if role == "send" and tokens and last:
                tokens_out.append(end)
            elif role == "send":
                x_out.append(end)
            elif tokens:
                tokens_in = end
            else:
                x_in = end
    return Wiring(group, x_in, x_out, tokens_in, tokens_out)
