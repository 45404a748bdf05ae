"""Measures a cluster: every device alone, then all at once, then the collectives between them.

Devices that share a memory bus are slower together than alone, so plans for several devices use the second figure.
Workers that share a core (`cpu:0`, `cpu:0#1`) are one piece of hardware, measured once.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from datetime import UTC, datetime
from typing import Literal

from msgspec import structs

from evener.cost.rates import (
    DEFAULT_COLLECTIVE,
    AttentionRates,
    Collective,
    DeviceProfile,
    GemmRates,
    Profile,
    Rates,
    bind,
    default_rates,
    hardware,
)
from evener.errors import InvalidDevice, StartFailed
from evener.profile.collectives import create
from evener.profile.hardware import check_present, last_level_cache, profile_key
from evener.profile.items import (
    AllReduce,
    DecodeAttention,
    Gemm,
    Item,
    OpOverhead,
    PrefillAttention,
    ReadBandwidth,
    Setup,
)
from evener.profile.process import ProbeProcess
from evener.profile.quiet import quietest
from evener.profile.store import save_profile
from evener.spec.cluster import Cluster, Device

ROWS, QUICK_ROWS = (1, 4, 16, 64, 256), (1, 16, 256)
SIZES, QUICK_SIZES = tuple(2048 << k for k in range(10)), (2048, 32768, 1 << 20)
"""Bytes per rank of the collectives, 2 KiB to 1 MiB."""
BUDGET_S, QUICK_BUDGET_S, PASSES = 0.03, 0.015, 3
MOST_RANKS = 8

Progress = Callable[[str, int, int], None]
"""Called with (what is measured, steps done, steps in all)."""


def measure(
    cluster: Cluster, quick: bool = False, keep: bool = True, progress: Progress | None = None, times: int = 1
) -> Profile:
    """Measure the hardware of a cluster in seconds; `quick` takes fewer points. `keep` stores the result.

    `times`: measure so often, and keep the best of each figure: for hosts that others use at times.
    The profile is bound to the cluster's workers (declared slow-downs, shared cores). What cannot be measured is
    assumed and named in `missing`. Raises InvalidDevice for what is not here, WorkerLost when a probe dies.
    """
    if not cluster.devices:
        raise InvalidDevice("there is no device to measure; name one, like --devices cpu:0")
    check_present(cluster.devices)
    remote = [d.name for d in cluster.devices if d.host != "localhost"]
    if remote:
        raise InvalidDevice(f"device {remote[0]} is on another host; run `evener devices` there")
    units = list({hardware(d): d for d in cluster.devices}.values())
    raw = quietest([_Run(units, quick, progress or (lambda what, done, steps: None)).measure() for _ in range(times)])
    if keep:
        save_profile(raw)
    return bind(raw, cluster.devices)


def rounds(units: Sequence[Device]) -> list[list[Device]]:
    """Groups that can work at once: no two devices of a group share a core."""
    out: list[list[Device]] = []
    for d in units:
        for group in out:
            if not any(set(d.cores) & set(other.cores) for other in group):
                group.append(d)
                break
        else:
            out.append([d])
    return out


class _Run:
    """One measurement of distinct hardware."""

    def __init__(self, units: list[Device], quick: bool, progress: Progress) -> None:
        self.rounds = rounds(units)
        self.rows: tuple[int, ...] = QUICK_ROWS if quick else ROWS
        self.sizes: tuple[int, ...] = QUICK_SIZES if quick else SIZES
        self.budget_s = QUICK_BUDGET_S if quick else BUDGET_S
        self.progress = progress
        self.missing: dict[str, None] = {}
        self.cpus = [d for d in self.rounds[0] if d.kind == "cpu"][:MOST_RANKS]
        self.ranks = tuple(range(2, len(self.cpus) + 1)) if len(self.cpus) <= 4 else (2, 4, len(self.cpus))
        if quick:
            self.ranks = self.ranks[-1:]
        together = [g for g in self.rounds if len(g) > 1]
        self.steps = sum(map(len, self.rounds)) + len(together) + len(self.ranks)
        self.done = 0
        self.contended: dict[str, list[float]] = {}

    def measure(self) -> Profile:
        """Alone, together, collectives; the probes are stopped in any case."""
        devices, collectives = [], []
        with ExitStack() as stack:
            fd = None
            if self.ranks:
                try:
                    segment = create(self.ranks)
                    stack.callback(segment.close)
                    fd = segment.fd
                except (ImportError, OSError) as error:
                    self.missing[f"collectives: no shared-memory transport here ({error}); assumed"] = None
            self._step("starting")
            for number, group in enumerate(self.rounds):
                probes = {d.name: self._start(stack, d, fd if number == 0 else None) for d in group}
                for p in probes.values():
                    p.wait_ready()
                alone = {}
                for d in group:
                    self._step(f"{hardware(d)} alone")
                    alone[d.name] = self._rates({d.name: probes[d.name]}, [d])[d.name]
                if len(group) > 1:
                    self._step("together: " + " ".join(hardware(d) for d in group))
                together = self._rates(probes, group) if len(group) > 1 else alone
                names = [hardware(d) for d in group]
                for d in group:
                    at, kind = hardware(d), _kind(d)
                    peers = tuple(n for n in names if n != at)
                    devices.append(DeviceProfile(at, kind, alone[d.name], together[d.name], peers, hardware=at))
                if number == 0 and fd is not None:
                    collectives = [self._collective(g, n, probes) for g, n in enumerate(self.ranks)]
        self.progress("done", self.steps, self.steps)
        return Profile(
            tuple(devices), tuple(collectives) or (DEFAULT_COLLECTIVE,), "measured",
            missing=tuple(self.missing), notes=self._notes(), key=profile_key(),
            measured_at=datetime.now(UTC).isoformat(timespec="seconds"),
        )  # fmt: skip

    def _notes(self) -> tuple[str, ...]:
        return tuple(
            f"{name}: other processes had the core for {share:.0%} of the time; it is taken out, but caches and memory "
            "were shared too: measure again on a quiet machine"
            for name, shares in self.contended.items()
            if (share := sum(shares) / len(shares)) > 0.05
        )

    def _step(self, what: str) -> None:
        self.progress(what, self.done, self.steps)
        self.done += what != "starting"

    def _start(self, stack: ExitStack, d: Device, fd: int | None) -> ProbeProcess:
        rank = self.cpus.index(d) if d in self.cpus else None
        cache = last_level_cache(d.cores[0]) if d.cores else 64 << 20
        shared = fd if rank is not None else None
        probe = ProbeProcess(d.name, Setup(d.kind, d.cores, d.index, cache, shared, self.ranks, rank or 0))
        stack.callback(probe.close)
        return probe

    def _ask(self, probes: dict[str, ProbeProcess], item: Item) -> dict[str, float | None]:
        """The same question to these probes at once; None with a note in `missing` where there is no answer."""
        for p in probes.values():
            p.ask(item, self.budget_s)
        answers = {name: p.answer() for name, p in probes.items()}
        for name, a in answers.items():
            if a.value is None:
                self.missing[a.reason] = None
            self.contended.setdefault(name, []).append(a.contended)
        return {name: a.value for name, a in answers.items()}

    def _passes(self, probes: dict[str, ProbeProcess], items: Sequence[Item]) -> list[dict[str, float | None]]:
        """Every item PASSES times, in turn; the median of its answers by device, None where one is missing.

        On a shared machine a disturbance outlasts one measurement, so the same one again at once would not show it.
        """
        passes = [[self._ask(probes, item) for item in items] for _ in range(PASSES)]
        return [{name: _median([a[name] for a in answers]) for name in probes} for answers in zip(*passes, strict=True)]

    def _rates(self, probes: dict[str, ProbeProcess], group: Sequence[Device]) -> dict[str, Rates]:
        dtypes = ("fp32", "bf16", "fp16", "int8") if any(d.kind == "cuda" for d in group) else ("fp32", "bf16", "int8")
        # Items of one dtype share tensors that take time to make, so passes go over them, not over everything.
        gemm = {t: self._passes(probes, [Gemm(t, r) for r in self.rows]) for t in dtypes}
        memory, op = self._passes(probes, [ReadBandwidth(), OpOverhead()])
        attention = {t: self._passes(probes, [PrefillAttention(t), DecodeAttention(t)]) for t in dtypes}
        out = {}
        for d in (d for d in group if d.name in probes):
            tables = []
            for dtype in dtypes:
                of_rows = zip(self.rows, gemm[dtype], strict=True)
                points = [(r, value) for r, answers in of_rows if (value := answers[d.name]) is not None]
                if points:
                    tables.append(GemmRates(dtype, tuple(points)))
            bandwidth, op_ns = memory[d.name], op[d.name]
            if not tables or bandwidth is None or op_ns is None:
                raise StartFailed(f"device {d.name} could not be measured at all: {'; '.join(self.missing)}")
            attends = tuple(
                AttentionRates(t, flops, read)
                for t, (prefill, decode) in attention.items()
                if (flops := prefill[d.name]) is not None and (read := decode[d.name]) is not None
            )
            assumed = default_rates(d)
            if not attends:
                self.missing["attention rates are assumed"] = None
                attends = tuple(structs.replace(a, bandwidth=min(bandwidth, a.bandwidth)) for a in assumed.attention)
            out[d.name] = Rates(tuple(tables), bandwidth, attends, op_ns, assumed.step_ns)
        return out

    def _collective(self, group: int, ranks: int, probes: dict[str, ProbeProcess]) -> Collective:
        self._step(f"all-reduce among {ranks} ranks")
        members = {d.name: probes[d.name] for d in self.cpus[:ranks]}
        points = []
        for nbytes in self.sizes:
            took = self._ask(members, AllReduce(group, nbytes)).values()
            points.append((nbytes, max(t for t in took if t is not None)))
        return Collective("shm", ranks, tuple(points))


def _median(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return statistics.median(known) if len(known) == len(values) else None


def _kind(d: Device) -> Literal["cpu", "cuda"]:
    return "cuda" if d.kind == "cuda" else "cpu"
