"""How many devices of a kind a rate and an objective take: the fewest that carry the traffic, kind by kind."""

import math
from collections.abc import Iterator
from dataclasses import replace

from msgspec import Struct, structs

from evener.cost.rates import hardware
from evener.errors import InvalidInput, InvalidPlan
from evener.plan.choose import best_tried, shortlist
from evener.plan.more import like_devices
from evener.plan.problem import Problem
from evener.plan.search import search
from evener.plan.trial import Progress, Tried, sample, try_plan
from evener.spec.cluster import Cluster, Device, Link
from evener.spec.cluster_text import BETWEEN_HOSTS

MOST = 256
MET = 0.9
"""Share of the requests that must meet the objective."""
TRIALS = 3


class Size(Struct, frozen=True):
    """The fewest devices like the one named, or why `MOST` are not enough."""

    like: str
    count: int | None
    tried: Tried | None
    reason: str = ""


def size_for(
    problem: Problem, requests: int = 300, progress: Progress = lambda what, done, steps: None
) -> Iterator[Size]:
    """For each kind of device of the cluster, alone. Raises InvalidInput when the traffic has no rate."""
    if problem.demand.rate is None:
        raise InvalidInput("--size needs traffic with a rate, like rate=4,in=512,out=128, or a trace with arrivals")
    for group in like_devices(problem):
        yield _size(problem, group[0], requests, progress)


def _size(problem: Problem, like: Device, requests: int, progress: Progress) -> Size:
    known: dict[int, tuple[Tried | None, str]] = {}

    def enough(count: int) -> bool:
        if count not in known:
            progress(f"{count} x {like.name}", len(known), len(known) + 1)
            known[count] = _carry(copies(problem, like, count), requests)
        return known[count][0] is not None

    high = 1
    while not enough(high):
        if high >= MOST:
            return Size(like.name, None, None, known[high][1])
        high = min(MOST, high * 2)
    low = high // 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return Size(like.name, high, known[high][0])


def _carry(problem: Problem, requests: int) -> tuple[Tried | None, str]:
    """The best plan, if it carries the traffic; else why not."""
    try:
        scored = search(problem)
    except InvalidPlan as error:
        return None, error.message
    rate = problem.demand.rate
    assert rate is not None
    scored = [s for s in scored if s.load.requests_s >= rate] or scored[:1]
    if scored[0].load.requests_s < rate:
        return None, f"{len(problem.cluster.devices)} serve {scored[0].load.requests_s:.3g} of {rate:.3g} requests/s"
    items = sample(problem, 1, requests)
    tried = [try_plan(problem, s, items) for s in shortlist(problem, scored, TRIALS)]
    best = best_tried(problem, tried)
    if problem.bounds and best.met < MET:
        return None, f"{len(problem.cluster.devices)} serve {best.met:.0%} of the requests within the objective"
    return best, ""


def copies(problem: Problem, like: Device, count: int) -> Problem:
    """The same problem on `count` devices like this one, hosts filled as they are in the cluster."""
    per_host = sum(
        d.host == like.host
        and (d.memory, d.slowdown, d.kind, d.peaks) == (like.memory, like.slowdown, like.kind, like.peaks)
        for d in problem.cluster.devices
    )
    if like.host == "localhost" and like.kind == "cpu":
        per_host = count  # cores of one machine; how many it has is the user's to say
    known = next(p for p in problem.profile.devices if (p.hardware or p.name) == hardware(like))
    inside = [x for x in problem.cluster.links if x.a == x.b == like.host]
    across = [x for x in problem.cluster.links if x.a == x.b == "*"]
    stated = [x for x in problem.cluster.links if like.host in (x.a, x.b) and x.a != x.b]
    if stated:  # as between the host of the one that is copied and another; the fastest, where there are several
        best = min(stated, key=lambda x: (x.delay, -(x.bandwidth or math.inf)))
        across = [structs.replace(best, a="*", b="*")]
    across = across or [BETWEEN_HOSTS]
    devices, profiles, links = [], [], list[Link]()
    for k in range(count):
        h, at = divmod(k, per_host)
        host = like.host if per_host == count else f"sized-{h}"
        name = f"{host}/{like.kind}:{at}" if host != "localhost" else f"{like.kind}:{at}"
        if at == 0 and host != like.host:
            links += [structs.replace(x, a=host, b=host) for x in inside]
        devices.append(structs.replace(like, name=name, host=host, index=at, cores=(at,) if like.cores else ()))
        profiles.append(structs.replace(known, name=name, hardware=name, peers=()))
    links += inside if per_host == count else across
    return replace(
        problem,
        cluster=Cluster(tuple(devices), tuple(links)),
        profile=structs.replace(problem.profile, devices=tuple(profiles)),
        host_bytes=None,  # how much memory such hosts have is the user's to say
    )
