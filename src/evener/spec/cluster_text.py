"""A cluster as parsed YAML: hosts, devices, the links between them. The form is in docs/clusters.md. No torch.

hosts:
  - name: box                       # left out, or localhost: this host
    devices:
      - cpu:0-7,memory=16GiB
      - {device: "cuda:0", profile: rtx_4090, count: 2}
  - {name: far, count: 4, link: nvlink4, devices: [{device: "cuda:0", profile: h100_sxm, count: 8}]}
links:
  - {between: [box, far-0], bandwidth: 10Gbit/s, latency: 50us}
"""

import re
from collections.abc import Iterator
from typing import Any

from msgspec import structs

from evener.errors import InvalidDevice
from evener.spec.cluster import Cluster, Device, Link, parse_device, parse_size
from evener.spec.links import ANY
from evener.spec.peaks import HOST_LINKS, Peaks, published
from evener.units import Seconds

BETWEEN_HOSTS = Link(ANY, ANY, Seconds(30e-6), 10e9 / 8)
"""Assumed between two hosts where nothing is said: 10 Gbit/s Ethernet, 30 microseconds one way."""
HOST_LATENCY = Seconds(1e-6)
"""Assumed one way between two devices of a host."""

_RATE = re.compile(r"^(\d+(?:\.\d+)?)\s*([KMGT]?)(bit|B)/s$")
_TIME = re.compile(r"^(\d+(?:\.\d+)?)\s*(ns|us|ms|s)$")
_PREFIX = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_NAME = re.compile(r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
MOST_DEVICES = 100_000


def cluster_from_mapping(raw: Any) -> Cluster:
    """Build a cluster. Raises InvalidDevice that names the place, the value and the remedy."""
    top = _mapping(raw, "a cluster file", ("hosts", "links"))
    devices: list[Device] = []
    links: list[Link] = []
    for k, entry in enumerate(_list(top.get("hosts"), "hosts")):
        for host, members, inside in _hosts(entry, f"hosts[{k}]"):
            if any(d.host == host for d in devices):
                raise InvalidDevice(f"hosts[{k}]: host {host} is named twice; put its devices into one entry")
            devices += members
            links += inside
            if len(devices) > MOST_DEVICES:
                raise InvalidDevice(f"hosts[{k}]: more than {MOST_DEVICES} devices; give fewer")
    names = [d.name for d in devices]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InvalidDevice(f"device {twice} is named twice; name a second worker on it {twice}#1")
    ends = {*names, *(d.host for d in devices), ANY}
    between = [_between(item, f"links[{k}]", ends) for k, item in enumerate(_list(top.get("links", []), "links"))]
    if len({d.host for d in devices}) > 1 and not any(x.a == ANY for x in between):
        between.append(BETWEEN_HOSTS)
    # What a file says about two devices or hosts stands instead of the assumption for a host.
    said = {frozenset((x.a, x.b)) for x in between}
    return Cluster(tuple(devices), tuple([x for x in links if frozenset((x.a, x.b)) not in said] + between))


def _hosts(entry: Any, where: str) -> Iterator[tuple[str, list[Device], list[Link]]]:
    """(name, devices, the link inside) of one entry, `count` times."""
    host = _mapping(entry, where, ("name", "count", "devices", "link"))
    name = host.get("name", "localhost")
    if not isinstance(name, str) or not _NAME.match(name):
        raise InvalidDevice(f"{where}: name {name!r} must be of letters, digits, dots and dashes")
    count = _count(host.get("count", 1), where)
    if name == "localhost" and count > 1:
        raise InvalidDevice(f"{where}: this host is there once; leave out count={count} or give a name")
    for k in range(count):
        at = f"{name}-{k}" if count > 1 else name
        members = [d for m, item in enumerate(_list(host.get("devices"), f"{where}.devices"))
                   for d in _devices(item, at, f"{where}.devices[{m}]")]  # fmt: skip
        yield at, members, _inside(host.get("link"), at, members, where)


def _devices(item: Any, host: str, where: str) -> Iterator[Device]:
    if isinstance(item, str):
        item = {"device": item}
    keys = ("device", "count", "profile", "peaks", "memory", "slowdown")
    given = _mapping(item, where, keys)
    text = given.get("device")
    if not isinstance(text, str):
        raise InvalidDevice(f'{where}: `device` says what it is, like device: "cuda:0"')
    first = parse_device(text)
    if "profile" in given and "peaks" in given:
        raise InvalidDevice(f"{where}: profile and peaks exclude each other; give one")
    peaks = _peaks(given, where)
    if peaks is None and host != "localhost":
        raise InvalidDevice(
            f"{where}: {host}/{first.name} cannot be measured from here; give it a `profile` like h100_sxm, or `peaks`"
        )
    memory = first.memory
    if "memory" in given:
        memory = parse_size(str(given["memory"]), f"{where}: memory")
    elif memory is None and peaks is not None:
        memory = peaks.memory
    slowdown = given.get("slowdown", first.slowdown)
    if isinstance(slowdown, bool) or not isinstance(slowdown, int | float) or not 1.0 <= slowdown <= 1000.0:
        raise InvalidDevice(f"{where}: slowdown={slowdown!r} must be a number from 1 to 1000")
    count = _count(given.get("count", 1), where)
    if count > 1 and first.kind == "cpu" and len(first.cores) != 1:
        raise InvalidDevice(
            f"{where}: count={count} is for GPUs and single cores; name {first.name}'s fellows yourself"
        )
    for k in range(count):
        shift = f"{first.kind}:{(first.cores[0] if first.cores else first.index) + k}"
        d = parse_device(shift) if count > 1 else first
        name = d.name if host == "localhost" else f"{host}/{d.name}"
        yield structs.replace(d, name=name, slowdown=float(slowdown), memory=memory, host=host, peaks=peaks)


def _peaks(given: dict[str, Any], where: str) -> Peaks | None:
    if "profile" in given:
        return published(str(given["profile"]))
    if "peaks" not in given:
        return None
    own = _mapping(given["peaks"], f"{where}.peaks", ("flops", "bandwidth", "link", "source"))
    flops = own.get("flops")
    if not isinstance(flops, dict) or not flops or not all(_positive(v) for v in flops.values()):
        raise InvalidDevice(f"{where}.peaks: flops={flops!r} must give flop/s by dtype, like {{bf16: 312e12}}")
    link = own.get("link", "pcie4")
    if link not in HOST_LINKS:
        raise InvalidDevice(f"{where}.peaks: link={link!r} is not one of {', '.join(HOST_LINKS)}")
    if "memory" not in given:
        raise InvalidDevice(f"{where}: peaks need a memory beside them, like memory: 24GB")
    rates = tuple((str(k), float(v)) for k, v in flops.items())
    memory = parse_size(str(given["memory"]), f"{where}: memory")
    return Peaks(
        rates, _bandwidth(own.get("bandwidth"), f"{where}.peaks"), memory, link, str(own.get("source", "given"))
    )


def _inside(said: Any, host: str, members: list[Device], where: str) -> list[Link]:
    """The link between any two devices of a host: as said, or the slowest kind that its devices have."""
    if isinstance(said, dict):
        own = _mapping(said, f"{where}.link", ("bandwidth", "latency"))
        latency = _latency(own.get("latency", "1us"), f"{where}.link")
        return [Link(host, host, latency, _bandwidth(own.get("bandwidth"), f"{where}.link"))]
    if said is not None and said not in HOST_LINKS:
        raise InvalidDevice(
            f"{where}: link={said!r} is not one of {', '.join(HOST_LINKS)}, nor a bandwidth and latency"
        )
    kinds = [said] if said is not None else [d.peaks.link for d in members if d.peaks is not None]
    if len(members) < 2 or not kinds:
        return []
    return [Link(host, host, HOST_LATENCY, min(HOST_LINKS[kind] for kind in kinds))]


def _between(item: Any, where: str, ends: set[str]) -> Link:
    link = _mapping(item, where, ("between", "bandwidth", "latency"))
    pair = _list(link.get("between"), f"{where}.between")
    if len(pair) != 2 or (ANY in pair and pair != [ANY, ANY]):
        raise InvalidDevice(f'{where}: between={pair!r} must name two devices, two hosts, or "*" twice')
    for end in pair:
        if end not in ends:
            raise InvalidDevice(f"{where}: {end!r} is no device or host of this cluster")
    bandwidth = _bandwidth(link["bandwidth"], where) if "bandwidth" in link else None
    return Link(pair[0], pair[1], _latency(link.get("latency", "0us"), where), bandwidth)


def _bandwidth(value: Any, where: str) -> float:
    """`10Gbit/s`, `450GB/s` or bytes per second."""
    if isinstance(value, str):
        # YAML reads 312e12 as text; a plain number is bytes per second.
        if m := _RATE.match(value.strip()):
            value = float(m.group(1)) * _PREFIX[m.group(2)] / (8 if m.group(3) == "bit" else 1)
        elif _positive(value):
            value = float(value)
    if not isinstance(value, int | float) or not _positive(value):
        raise InvalidDevice(f"{where}: bandwidth={value!r} is not understood; write it like 10Gbit/s or 450GB/s")
    return float(value)


def _latency(value: Any, where: str) -> Seconds:
    m = _TIME.match(str(value).strip())
    if not m:
        raise InvalidDevice(f"{where}: latency={value!r} is not understood; write it like 50us or 1ms")
    return Seconds(float(m.group(1)) * {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0}[m.group(2)])


def _positive(value: Any) -> bool:
    try:
        return not isinstance(value, bool) and 0 < float(value) < float("inf")
    except (TypeError, ValueError):
        return False


def _count(value: Any, where: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST_DEVICES:
        raise InvalidDevice(f"{where}: count={value!r} must be a whole number from 1 to {MOST_DEVICES}")
    return value


def _mapping(raw: Any, where: str, keys: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(raw, dict):
        raise InvalidDevice(f"{where} is a mapping with {', '.join(keys)}; see docs/clusters.md")
    for key in raw:
        if key not in keys:
            raise InvalidDevice(f"{where}: {key!r} is unknown; known: {', '.join(keys)}")
    return raw


def _list(raw: Any, where: str) -> list[Any]:
    if not isinstance(raw, list):
        raise InvalidDevice(f"{where} must be a list; see docs/clusters.md")
    return raw
