"""Units carried by types. One unit inside, converted at the edge.

The brain, the ledger and the simulator count time in integer nanoseconds, so that sums are exact.
Reports and user-facing settings use seconds.
"""

from typing import NewType

Seconds = NewType("Seconds", float)
Nanoseconds = NewType("Nanoseconds", int)
Bytes = NewType("Bytes", int)
Tokens = NewType("Tokens", int)

NS_PER_S = 1_000_000_000


def ns(seconds: float) -> Nanoseconds:
    """Seconds to integer nanoseconds, rounded to the nearest."""
    return Nanoseconds(round(seconds * NS_PER_S))


def seconds(nanoseconds: int) -> Seconds:
    """Integer nanoseconds to seconds."""
    return Seconds(nanoseconds / NS_PER_S)


def human_bytes(n: float) -> str:
    """`1536` -> `1.5 KiB`; used in messages only."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if abs(n) < 1024:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1024
    return f"{n:.1f} TiB"
