"""What one device more of each kind would bring, and how many devices a rate and an objective take."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

from msgspec import Struct, structs

from evener.cost.rates import bind, hardware
from evener.plan.alike import kinds_nearly
from evener.plan.problem import Problem
from evener.plan.search import Scored, search
from evener.spec.cluster import Cluster, Device, Link


class Gain(Struct, frozen=True):
    """One device more of a kind, like the one named."""

    like: str
    count: int
    """How many of this kind there are now."""
    capacity_tok_s: float
    ratio: float
    """Of the capacity now; never below 1, as a device may stay idle."""
    plan: str


def one_more(problem: Problem, now: Scored) -> Iterator[Gain]:
    """For each kind of device: the best capacity with one more of it, by the cost model."""
    for group in like_devices(problem):
        larger = with_more(problem, {group[0].name: 1})
        found = search(larger)[0]
        best = found if found.load.tokens_s > now.load.tokens_s else now
        ratio = best.load.tokens_s / now.load.tokens_s
        yield Gain(group[0].name, len(group), best.load.tokens_s, ratio, best.plan.name)


def like_devices(problem: Problem) -> list[list[Device]]:
    """Devices that declare the same and are as fast, wherever they are."""
    devices = problem.cluster.devices
    kinds = kinds_nearly(problem, bind(problem.profile, devices), devices)
    groups: dict[int, list[Device]] = {}
    for d in devices:
        groups.setdefault(kinds[d.name], []).append(d)
    return list(groups.values())


def with_more(problem: Problem, counts: dict[str, int]) -> Problem:
    """The same problem with `counts[name]` further devices like the named ones, on hardware and links like theirs."""
    devices: list[Device] = list(problem.cluster.devices)
    links: list[Link] = list(problem.cluster.links)
    profiles = list(problem.profile.devices)
    at = 1_000_000
    for name, count in counts.items():
        like = problem.cluster.device(name)
        known = next(p for p in problem.profile.devices if (p.hardware or p.name) == hardware(like))
        # A GPU that has its host to itself brings another host along.
        lonely = like.host != "localhost" and sum(d.host == like.host for d in problem.cluster.devices) == 1
        for k in range(count):
            at += 1
            host = f"{like.host}+{k + 1}" if lonely else like.host
            new = f"{host}/{hardware(like).rpartition('/')[2]}" if lonely else f"{hardware(like)}+{k + 1}"
            cores = tuple(at for _ in like.cores[:1])
            devices.append(structs.replace(like, name=new, host=host, index=at, cores=cores))
            profiles.append(structs.replace(known, name=new, hardware=new))
            renamed = {name: new, like.host: host} if lonely else {name: new}
            for x in problem.cluster.links:
                if x.a in renamed or x.b in renamed:
                    links.append(structs.replace(x, a=renamed.get(x.a, x.a), b=renamed.get(x.b, x.b)))
    return replace(
        problem,
        cluster=Cluster(tuple(devices), tuple(links)),
        profile=structs.replace(problem.profile, devices=tuple(profiles)),
    )


def only(problem: Problem, names: Sequence[str]) -> Problem:
    """The same problem with these devices alone."""
    kept = set(names)
    devices = tuple(d for d in problem.cluster.devices if d.name in kept)
    gone = {d.name for d in problem.cluster.devices} - kept
    links = tuple(x for x in problem.cluster.links if x.a not in gone and x.b not in gone)
    return replace(problem, cluster=Cluster(devices, links))
