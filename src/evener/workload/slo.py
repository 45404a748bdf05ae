"""Service-level objectives: which completed requests count as good.

Spelling: `ttft=200ms,tpot=50ms,e2e=10s`; any of the three, each at most once, with a unit (us, ms, s).
"""

import re

from msgspec import Struct

from evener.errors import InvalidInput

_UNIT_MS = {"us": 1e-3, "ms": 1.0, "s": 1e3}
_VALUE = re.compile(r"^(\d+(?:\.\d+)?)\s*(us|ms|s)$")


class Slo(Struct, frozen=True):
    """Upper bounds in milliseconds, met when the value is not above; None is no bound."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def met(self, ttft_ms: float, tpot_ms: float | None, e2e_ms: float) -> bool:
        """Whether a request is good. An answer of one token has no TPOT and meets any bound on it."""
        pairs = ((self.ttft_ms, ttft_ms), (self.tpot_ms, tpot_ms), (self.e2e_ms, e2e_ms))
        return all(bound is None or value is None or value <= bound for bound, value in pairs)


def parse_slo(text: str) -> Slo:
    """`Slo` from its spelling (InvalidInput names the part that is wrong)."""
    bounds: dict[str, float] = {}
    for part in text.split(","):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or key not in ("ttft", "tpot", "e2e"):
            raise InvalidInput(f"--slo {part.strip()!r}: write METRIC=TIME with METRIC one of ttft, tpot, e2e")
        if key in bounds:
            raise InvalidInput(f"--slo names {key} twice; give it once")
        found = _VALUE.match(value)
        if not found or float(found[1]) <= 0:
            raise InvalidInput(
                f"--slo {key}={value!r} is not a positive time with a unit; write {key}=200ms or {key}=1.5s"
            )
        bounds[key] = float(found[1]) * _UNIT_MS[found[2]]
    return Slo(bounds.get("ttft"), bounds.get("tpot"), bounds.get("e2e"))
