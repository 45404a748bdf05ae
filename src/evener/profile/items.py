"""What a probe process is asked, and what it answers: one JSON object per line. No torch."""

from msgspec import Struct


class Gemm(Struct, frozen=True, tag=True):
    """Flop/s of linear layers of a transformer whose weights exceed the cache."""

    dtype: str
    rows: int


class ReadBandwidth(Struct, frozen=True, tag=True):
    """Bytes per second read from memory."""


class PrefillAttention(Struct, frozen=True, tag=True):
    """Flop/s of causal attention over one chunk."""

    kv_dtype: str


class DecodeAttention(Struct, frozen=True, tag=True):
    """Bytes of K and V per second read by decoding rows; layers take turns, so that their KV exceeds the cache."""

    kv_dtype: str


class OpOverhead(Struct, frozen=True, tag=True):
    """Nanoseconds to start an operator on next to no data."""


class AllReduce(Struct, frozen=True, tag=True):
    """Nanoseconds (lower quartile) of an all-reduce of `nbytes` (fp32) in a group of the inherited segment.

    All ranks of the group are asked at once, with the same budget.
    """

    group: int
    nbytes: int


Item = Gemm | ReadBandwidth | PrefillAttention | DecodeAttention | OpOverhead | AllReduce


class Ask(Struct, frozen=True):
    """One measurement, given about `budget_s` seconds."""

    item: Item
    budget_s: float


class Answer(Struct, frozen=True):
    """The figure, or why there is none."""

    value: float | None = None
    reason: str = ""
    contended: float = 0.0
    """Share of the measuring time in which other processes had the core; already taken out of `value`."""


class Setup(Struct, frozen=True):
    """The first line a probe reads."""

    kind: str
    cores: tuple[int, ...]
    index: int
    cache_bytes: int
    segment_fd: int | None = None
    """Shared memory for the collectives."""
    group_sizes: tuple[int, ...] = ()
    """Ranks of the groups laid out in the segment; group g joins the first `group_sizes[g]` probes."""
    rank: int = 0
    """This probe's rank in those groups."""
