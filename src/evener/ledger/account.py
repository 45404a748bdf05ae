"""Accounts: what the ledger says about a window. Frozen data that serialises to JSON as it is."""

import math
from collections.abc import Sequence
from typing import Any

from msgspec import Struct

from evener.ledger.book import (
    BATCHES,
    BUSY,
    COUNTERS,
    CPU,
    DECODE_ROWS,
    DECODE_STEPS,
    KBYTES,
    KFLOP,
    LINK_COUNTERS,
    PREFILL_TOKENS,
    ROOF,
    SIZE_CLASSES,
    SPANS,
    SPREAD,
    SPREAD_SHIFT,
    DeviceBook,
)
from evener.ledger.causes import COMPUTE, N_CAUSES, USEFUL, Cause
from evener.ledger.replica import ReplicaBook
from evener.ledger.spans import Op
from evener.spec.plan import Plan, size
from evener.units import NS_PER_S


class Use(Struct, frozen=True, kw_only=True):
    """How the time of one device, or of several together, was used. Seconds are device-seconds."""

    wall_s: float
    causes: dict[str, float]
    """Label -> seconds; all causes, in the order of the list. They sum to `wall_s`."""
    causes_ns: tuple[int, ...]
    """The same in whole nanoseconds, by `Cause`: these sum exactly."""
    compute_s: float
    cpu_s: float
    """CPU seconds that the devices' threads report for `compute_s`, where spans say so."""
    achieved_over_peak: float | None
    """The least time that the work needs at the devices' peak (roofline) over the time it took; None: not known."""
    flop_s: float
    """Operations per second of compute."""
    bytes_s: float
    """Bytes that must be read or written, per second of compute."""
    batches: int
    spans: int

    @property
    def wall_ns(self) -> int:
        """Exact."""
        return sum(self.causes_ns)

    def share(self, *causes: Cause) -> float:
        """Part of the wall time, 0 to 1; 0 of no time."""
        return sum(self.causes_ns[c] for c in causes) / self.wall_ns if self.wall_ns else 0.0

    @property
    def useful(self) -> float:
        """Part of the wall time that computed what somebody asked for, once."""
        return self.share(*USEFUL)


class DeviceAccount(Use, frozen=True, kw_only=True):
    """One device, that is one shard."""

    replica: int
    stage: int
    rank: int
    heads: int
    """Query heads that it computes."""
    ffn: int
    """Columns of the feed-forward network."""


class StageAccount(Use, frozen=True, kw_only=True):
    """The devices of one stage together."""

    replica: int
    stage: int
    layers: int
    devices: tuple[str, ...]
    busy_s: float
    """Device-seconds with a batch in hand, not waiting for another stage."""
    batch_s: float
    """The part of a batch, on average."""
    batch_std_s: float
    """Standard deviation over the batches."""


class ReplicaAccount(Use, frozen=True, kw_only=True):
    """The devices of one replica together."""

    devices: tuple[str, ...]
    short_of_kv_s: float
    """Seconds in which a request waited for KV blocks, batches running or not."""
    short_of_kv_tokens: int
    """Known tokens of the requests that waited meanwhile, on average: more room for so many would have let them in."""
    short_of_kv_requests: float
    """How many these were, on average."""
    mean_decode_rows: float
    """Rows of a decode step, on average."""
    prefill_tokens: int
    """Prompt tokens computed, recomputed ones included."""
    down: str | None
    """Why it is down, if it is so at the window's end."""
    loading_s: float
    """Seconds before it served for the first time."""


class LinkAccount(Struct, frozen=True, kw_only=True):
    """What the ranks of one stage moved by one kind of operation, in batches of a size."""

    replica: int
    stage: int
    op: str
    """`all_reduce`, `send`, ..."""
    rows: str
    """Rows of the batches, one of SIZE_CLASSES."""
    count: int
    """Operations, over all ranks."""
    nbytes: int
    waited_s: float
    """For slower peers or other stages (device-seconds)."""
    moving_s: float
    """After all had arrived: transfer (device-seconds)."""


class Account(Struct, frozen=True, kw_only=True):
    """Where every device-second of a window went."""

    window_s: float
    since_s: float
    """Seconds after the ledger's start."""
    until_s: float
    epoch: int
    devices: dict[str, DeviceAccount]
    """A device's own `wall_s` ends with its last span where a batch is still running at the window's end."""
    stages: dict[str, StageAccount]
    """`replica.stage` -> account."""
    replicas: dict[str, ReplicaAccount]
    total: Use
    """All devices together."""
    links: tuple[LinkAccount, ...]
    late_spans: int
    """Spans that came after their replica was known to be down; their time is `down`."""


# ---- from the books ---------------------------------------------------------------------------------------------


def read_account(plan: Plan, books: Sequence[ReplicaBook], start: int, began: int, ended: int) -> Account:
    """The account of [began, ended), which must be inside what the books keep."""
    devices: dict[str, DeviceAccount] = {}
    stages: dict[str, StageAccount] = {}
    replicas: dict[str, ReplicaAccount] = {}
    links: list[LinkAccount] = []
    everything: list[list[int]] = []
    for replica in books:
        of_replica: list[list[int]] = []
        for s, stage in enumerate(replica.stages):
            rows = [window(book, began, ended) for book in stage]
            spec = plan.replicas[replica.index].stages[s]
            for k, (book, row, shard) in enumerate(zip(stage, rows, spec.shards, strict=True)):
                devices[book.device] = DeviceAccount(
                    replica=replica.index, stage=s, rank=k, heads=size(shard.heads), ffn=size(shard.ffn),
                    **_use([book], row),
                )  # fmt: skip
            stages[f"{replica.index}.{s}"] = _stage(replica.index, s, size(spec.layers), stage, _sum(rows))
            links += _links(replica.index, s, list(zip(stage, rows, strict=True)))
            of_replica += rows
        together = _sum(of_replica)
        replicas[str(replica.index)] = _replica(replica, together, began, ended)
        everything.append(together)
    return Account(
        window_s=(ended - began) / NS_PER_S, since_s=(began - start) / NS_PER_S, until_s=(ended - start) / NS_PER_S,
        epoch=plan.epoch, devices=devices, stages=stages, replicas=replicas,
        total=Use(**_use([b for r in books for b in r.devices], _sum(everything))), links=tuple(links),
        late_spans=sum(r.late_spans for r in books),
    )  # fmt: skip


def window(book: DeviceBook, since: int, until: int) -> list[int]:
    """Growth of a device's counters in a window, as far as it is accounted for."""
    series = book.series
    return series.between(min(since, series.until), min(until, series.until))


def _stage(replica: int, stage: int, layers: int, books: Sequence[DeviceBook], counters: Sequence[int]) -> StageAccount:
    batches = max(1, counters[BATCHES])
    mean = counters[BUSY] / batches
    square = counters[SPREAD] / batches * (1 << SPREAD_SHIFT) ** 2
    return StageAccount(
        replica=replica, stage=stage, layers=layers, devices=tuple(b.device for b in books),
        busy_s=counters[BUSY] / NS_PER_S, batch_s=mean / NS_PER_S,
        batch_std_s=math.sqrt(max(0.0, square - mean * mean)) / NS_PER_S, **_use(books, counters),
    )  # fmt: skip


def _replica(book: ReplicaBook, counters: Sequence[int], began: int, ended: int) -> ReplicaAccount:
    short = book.short.series
    short_ns, token_us, request_us = short.between(min(began, short.until), min(ended, short.until))
    steps = counters[DECODE_STEPS]
    return ReplicaAccount(
        devices=tuple(b.device for b in book.devices), short_of_kv_s=short_ns / NS_PER_S,
        short_of_kv_tokens=token_us * 1000 // short_ns if short_ns else 0,
        short_of_kv_requests=request_us * 1000 / short_ns if short_ns else 0.0,
        mean_decode_rows=counters[DECODE_ROWS] / steps if steps else 0.0,
        prefill_tokens=counters[PREFILL_TOKENS] // len(book.devices),
        down=book.why_down if ended >= book.down_since else None,
        loading_s=max(0, min(ended, book.first_up) - began) / NS_PER_S,
        **_use(book.devices, counters),
    )  # fmt: skip


def _use(books: Sequence[DeviceBook], counters: Sequence[int]) -> dict[str, Any]:
    """The fields of `Use`."""
    causes = tuple(counters[:N_CAUSES])
    compute = sum(causes[c] for c in COMPUTE)
    per_s = NS_PER_S / compute if compute else 0.0
    has_peak = compute > 0 and all(book.peak is not None for book in books)
    return {
        "wall_s": sum(causes) / NS_PER_S,
        "causes": {c.label: causes[c] / NS_PER_S for c in Cause},
        "causes_ns": causes,
        "compute_s": compute / NS_PER_S,
        "cpu_s": counters[CPU] / NS_PER_S,
        "achieved_over_peak": counters[ROOF] / compute if has_peak else None,
        "flop_s": counters[KFLOP] * 1000 * per_s,
        "bytes_s": counters[KBYTES] * 1000 * per_s,
        "batches": counters[BATCHES],
        "spans": counters[SPANS],
    }


def _sum(rows: Sequence[Sequence[int]]) -> list[int]:
    """Several devices together. Counters of links differ by device and are left out."""
    return [sum(row[k] for row in rows) for k in range(COUNTERS)]


def _links(replica: int, stage: int, books: Sequence[tuple[DeviceBook, Sequence[int]]]) -> list[LinkAccount]:
    """What the devices of one stage moved, from their counters."""
    sums: dict[tuple[int, int], list[int]] = {}
    for book, counters in books:
        for key, at in book.links.items():
            into = sums.setdefault(key, [0] * LINK_COUNTERS)
            for k in range(LINK_COUNTERS):
                into[k] += counters[at + k]
    return [
        LinkAccount(
            replica=replica, stage=stage, op=Op(op).name.lower(), rows=SIZE_CLASSES[klass], count=count, nbytes=nbytes,
            waited_s=waited / NS_PER_S, moving_s=moving / NS_PER_S,
        )
        for (op, klass), (count, nbytes, waited, moving) in sorted(sums.items())
        if count
    ]  # fmt: skip
