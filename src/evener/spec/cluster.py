"""Devices and links, as declared or measured. No torch.

A device name says what it is and where: `cpu:0` (one core), `cpu:0-7` (eight cores), `cuda:0`. A second
worker on the same core carries a tag: `cpu:0#1`. Options follow a comma: `cpu:1,slowdown=2,memory=512MiB`.
"""

import re

from msgspec import Struct

from evener.errors import InvalidDevice
from evener.spec.peaks import Peaks
from evener.units import Bytes, Seconds

_NAME = re.compile(r"^(cpu|cuda):(\d+)(?:-(\d+))?(?:#(\w+))?$")
_SIZE = re.compile(r"^(\d+(?:\.\d+)?)\s*(B|KB|MB|GB|KiB|MiB|GiB)?$")
_UNIT = {
    "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30,
}  # fmt: skip


class Device(Struct, frozen=True):
    """One place where a worker runs."""

    name: str
    """Unique in the cluster: `cpu:0`, `cpu:0-3`, `cuda:0`, `cpu:0#1`; on another host `node1/cuda:0`."""
    kind: str
    """`cpu` or `cuda`."""
    cores: tuple[int, ...] = ()
    """Logical CPUs that the worker is pinned to (for `cuda`: empty, any core)."""
    index: int = 0
    """CUDA ordinal."""
    slowdown: float = 1.0
    """Declared: it takes so many times as long. It keeps its core meanwhile; where others share it, it sleeps."""
    memory: Bytes | None = None
    """Declared limit for weights and KV; None: the host's share."""
    host: str = "localhost"
    peaks: Peaks | None = None
    """Published rates, where the device cannot be measured here."""


class Link(Struct, frozen=True):
    """A declared property of the way between two devices, or two hosts (`evener.spec.links`); absent links are as fast
    as measured."""

    a: str
    b: str
    delay: Seconds = Seconds(0.0)
    bandwidth: float | None = None
    """Bytes per second; None: unlimited."""


class Cluster(Struct, frozen=True):
    """Devices and the declared links between them."""

    devices: tuple[Device, ...]
    links: tuple[Link, ...] = ()

    def device(self, name: str) -> Device:
        """The device of that name. Raises InvalidDevice naming the ones there are."""
        for d in self.devices:
            if d.name == name:
                return d
        have = ", ".join(d.name for d in self.devices) or "none"
        raise InvalidDevice(f"device {name!r} is not in the cluster (devices: {have})")


def parse_size(text: str, what: str = "size") -> Bytes:
    """`512MiB`, `2GB`, `1048576` -> bytes. Raises InvalidDevice."""
    m = _SIZE.match(text.strip())
    if not m:
        raise InvalidDevice(f"{what} {text!r} is not a size; write it like 512MiB or 2GB")
    return Bytes(int(float(m.group(1)) * _UNIT[m.group(2) or "B"]))


def parse_device(text: str) -> Device:
    """Parse `cpu:0-3,slowdown=2,memory=1GiB`. Raises InvalidDevice with the remedy."""
    name, *options = [part.strip() for part in text.split(",")]
    m = _NAME.match(name)
    if not m:
        raise InvalidDevice(
            f"device {name!r} is not understood; write cpu:0, cpu:0-7, cuda:0, or cpu:0#1 for a "
            "second worker on the same core"
        )
    kind, first, last = m.group(1), int(m.group(2)), m.group(3)
    if kind == "cuda" and last is not None:
        raise InvalidDevice(f"device {name!r}: a range is for cpu cores; name one GPU, like cuda:{first}")
    end = int(last) if last is not None else first
    if end < first:
        raise InvalidDevice(f"device {name!r}: core range {first}-{end} runs backwards")
    slowdown, memory = 1.0, None
    for option in options:
        key, _, value = option.partition("=")
        if key == "slowdown":
            try:
                slowdown = float(value)
            except ValueError:
                slowdown = 0.0
            if not 1.0 <= slowdown <= 1000.0:
                raise InvalidDevice(f"device {name}: slowdown={value!r} must be a number from 1 to 1000")
        elif key == "memory":
            memory = parse_size(value, f"device {name}: memory")
        else:
            raise InvalidDevice(f"device {name}: unknown option {key!r}; options are slowdown=, memory=")
    cores = tuple(range(first, end + 1)) if kind == "cpu" else ()
    return Device(name=name, kind=kind, cores=cores, index=first if kind == "cuda" else 0,
                  slowdown=slowdown, memory=memory)  # fmt: skip
