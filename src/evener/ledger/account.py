"""Accounts: what the ledger says about a window. Frozen data that serialises to JSON as it is."""

from collections.abc import Iterable, Sequence

from msgspec import Struct

from evener.ledger.book import (
    BATCHES,
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
    DeviceBook,
)
from evener.ledger.causes import COMPUTE, N_CAUSES, USEFUL, Cause
from evener.ledger.spans import Op
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


class ReplicaAccount(Use, frozen=True, kw_only=True):
    """The devices of one replica together."""

    devices: tuple[str, ...]
    short_of_kv_s: float
    """Seconds in which a request waited for KV blocks, batches running or not."""
    short_of_kv_tokens: int
    """Known tokens of the requests that waited meanwhile, on average: more room for so many would have let them in."""
    mean_decode_rows: float
    """Rows of a decode step, on average."""
    prefill_tokens: int
    """Prompt tokens computed, recomputed ones included."""
    down: str | None
    """Why it is down now."""


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


def use_of(counters: Sequence[int], has_peak: bool) -> dict[str, object]:
    """The fields of `Use` from a device's counters, or the sum of several devices'."""
    causes = tuple(counters[:N_CAUSES])
    compute = sum(causes[c] for c in COMPUTE)
    per_s = NS_PER_S / compute if compute else 0.0
    return {
        "wall_s": sum(causes) / NS_PER_S,
        "causes": {c.label: causes[c] / NS_PER_S for c in Cause},
        "causes_ns": causes,
        "compute_s": compute / NS_PER_S,
        "cpu_s": counters[CPU] / NS_PER_S,
        "achieved_over_peak": counters[ROOF] / compute if compute and has_peak else None,
        "flop_s": counters[KFLOP] * 1000 * per_s,
        "bytes_s": counters[KBYTES] * 1000 * per_s,
        "batches": counters[BATCHES],
        "spans": counters[SPANS],
    }


def sum_of(rows: Iterable[Sequence[int]], counters: int) -> list[int]:
    """Counters of several devices together; the appended ones differ by device and are left out."""
    out = [0] * counters
    for row in rows:
        for k in range(counters):
            out[k] += row[k]
    return out


def decode_rows(counters: Sequence[int]) -> float:
    """Mean rows of a decode step; every device of a replica counts each of its steps."""
    return counters[DECODE_ROWS] / counters[DECODE_STEPS] if counters[DECODE_STEPS] else 0.0


def prefill_tokens(counters: Sequence[int], devices: int) -> int:
    """Prompt tokens of a replica, from the sum over its devices."""
    return counters[PREFILL_TOKENS] // devices


def links_of(replica: int, stage: int, books: Sequence[tuple[DeviceBook, Sequence[int]]]) -> list[LinkAccount]:
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
