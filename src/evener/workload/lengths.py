"""How long prompts and answers are: distributions over whole tokens, at least 1, and their spelling.

128                        every one 128
uniform:16:512             uniform over 16 .. 512, both included
lognormal:180:0.8          median 180, sigma 0.8 (of the natural logarithm), at least 1
lognormal:180:0.8:16:1000  the same, cut to 16 .. 1000
"""

from typing import Protocol

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

from evener.errors import InvalidInput

Counts = NDArray[np.int64]

FORMS = "128, uniform:LOW:HIGH or lognormal:MEDIAN:SIGMA[:LOW:HIGH]"


class Lengths(Protocol):
    """A distribution of lengths."""

    def draw(self, n: int, rng: np.random.Generator) -> Counts:
        """`n` lengths in tokens, each at least 1; the same for the same state of `rng`."""
        ...


class Fixed(Struct, frozen=True):
    """Always the same length."""

    tokens: int

    def draw(self, n: int, rng: np.random.Generator) -> Counts:
        """See `Lengths`."""
        return np.full(n, self.tokens, dtype=np.int64)


class Uniform(Struct, frozen=True):
    """Every length in [low, high] equally likely, both ends included."""

    low: int
    high: int

    def draw(self, n: int, rng: np.random.Generator) -> Counts:
        """See `Lengths`."""
        return rng.integers(self.low, self.high + 1, n)


class LogNormal(Struct, frozen=True):
    """exp(Normal(log(median), sigma)), rounded, then cut to [low, high]."""

    median: float
    sigma: float
    low: int = 1
    high: int = 2**31

    def draw(self, n: int, rng: np.random.Generator) -> Counts:
        """See `Lengths`."""
        values = np.rint(rng.lognormal(np.log(self.median), self.sigma, n))
        return np.clip(values, self.low, self.high).astype(np.int64)


class InOrder(Struct, frozen=True):
    """The lengths of a trace, in its order."""

    tokens: tuple[int, ...]

    def draw(self, n: int, rng: np.random.Generator) -> Counts:
        """See `Lengths`. Raises InvalidInput when more are asked for than there are."""
        if n > len(self.tokens):
            raise InvalidInput(f"{n} requests were asked for, the trace has {len(self.tokens)}; lower --requests")
        return np.array(self.tokens[:n], dtype=np.int64)


def parse_lengths(spec: str, option: str) -> Lengths:
    """A distribution from its spelling. `option` is named in the message of InvalidInput."""
    kind, *fields = spec.strip().split(":")
    try:
        match kind, [float(x) for x in fields]:
            case "uniform", [low, high]:
                return Uniform(*_range(low, high))
            case "lognormal", [median, sigma] if median > 0 and sigma >= 0:
                return LogNormal(median, sigma)
            case "lognormal", [median, sigma, low, high] if median > 0 and sigma >= 0:
                return LogNormal(median, sigma, *_range(low, high))
            case number, []:
                tokens = float(number)
                return Fixed(_range(tokens, tokens)[0])
    except (ValueError, OverflowError):
        pass
    raise InvalidInput(f"{option} {spec!r} is no length in tokens (at least 1, LOW <= HIGH); write {FORMS}")


def _range(low: float, high: float) -> tuple[int, int]:
    if low != int(low) or high != int(high) or not 1 <= low <= high:
        raise ValueError
    return int(low), int(high)
