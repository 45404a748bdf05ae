"""What this host has: cores, GPUs, caches, and the key for its figures. Loads torch only for a GPU."""

import hashlib
import os
import platform
import re
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import psutil

from evener.cost.rates import FORMAT
from evener.errors import InvalidDevice
from evener.spec.cluster import Cluster, Device, parse_device
from evener.spec.memory import shares_memory
from evener.units import Bytes


def local_devices() -> list[Device]:
    """One device per logical CPU that this process may use, then one per CUDA GPU."""
    cores = [parse_device(f"cpu:{core}") for core in sorted(os.sched_getaffinity(0))]
    return cores + [parse_device(f"cuda:{k}") for k in range(gpu_count())]


def gpu_count() -> int:
    """CUDA devices; torch is asked only where a driver is present."""
    if not any(Path(p).exists() for p in ("/dev/nvidiactl", "/dev/dxg", "/proc/driver/nvidia")):
        return 0
    import torch

    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def check_present(devices: Sequence[Device]) -> None:
    """Raise InvalidDevice, naming what there is, when one of these is not on this host."""
    allowed = os.sched_getaffinity(0)
    for d in devices:
        if d.host != "localhost":
            raise InvalidDevice(
                f"device {d.name} is on host {d.host}; this host serves and measures its own devices only, "
                "others can be planned for and simulated"
            )
        absent = [core for core in d.cores if core not in allowed]
        if absent:
            raise InvalidDevice(
                f"device {d.name}: core {absent[0]} is not available to this process "
                f"(available: {_ranges(sorted(allowed))}); name one of these"
            )
        if d.kind == "cuda" and d.index >= (have := gpu_count()):
            raise InvalidDevice(f"device {d.name}: this host has {have} CUDA devices that torch can use; name cpu:0")


def _ranges(cores: list[int]) -> str:
    """`[0, 1, 2, 5]` -> `0-2, 5`."""
    parts: list[list[int]] = []
    for core in cores:
        if parts and core == parts[-1][-1] + 1:
            parts[-1].append(core)
        else:
            parts.append([core])
    return ", ".join(str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts)


def processor() -> str:
    """The processor's name as the kernel gives it."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()


def last_level_cache(core: int = 0) -> Bytes:
    """Bytes of the largest cache that a core uses; 32 MiB where the kernel does not say."""
    best = 0
    for entry in Path(f"/sys/devices/system/cpu/cpu{core}/cache").glob("index*/size"):
        m = re.fullmatch(r"(\d+)([KM]?)", entry.read_text().strip())
        if m:
            best = max(best, int(m.group(1)) << {"": 0, "K": 10, "M": 20}[m.group(2)])
    return Bytes(best or 32 << 20)


def free_memory(cluster: Cluster) -> Bytes | None:
    """What is free on this host, where devices of it declare no memory of their own; else None."""
    return Bytes(psutil.virtual_memory().available) if any(map(shares_memory, cluster.devices)) else None


def profile_key() -> str:
    """Host, processor and versions that figures hold for: `host-amd-epyc-1a2b3c4d`. A new torch is a new key."""
    host, cpu = platform.node() or "host", processor()
    parts = [
        host,
        cpu,
        str(os.cpu_count()),
        str(last_level_cache()),
        _version("torch"),
        _version("evener"),
        str(FORMAT),
        *filter(None, [os.environ.get("EVENER_ISA")]),  # other kernels, other figures
    ]
    digest = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8]
    slug = re.sub(r"[^a-z0-9]+", "-", f"{host} {cpu}".lower()).strip("-")
    return f"{slug[:60]}-{digest}"


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"
