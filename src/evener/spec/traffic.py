"""What traffic a plan is made for: mean lengths, and how many requests decode at once. No torch."""

import math

from msgspec import Struct

from evener.errors import InvalidTrace

_KEYS = {"in": "input_tokens", "out": "output_tokens", "rows": "decode_rows", "cached": "cached"}


class TrafficMix(Struct, frozen=True):
    """A stated mix, written `in=1020,out=129` (and `,rows=32,cached=0.25`).

    Default plans split layers, heads and columns by the time of the batches that this mix settles into.
    """

    input_tokens: float = 512.0
    """Mean prompt tokens per request."""
    output_tokens: float = 128.0
    """Mean output tokens per request."""
    decode_rows: int = 32
    """Requests that decode in one batch."""
    cached: float = 0.0
    """Share of the prompt that is found in the prefix cache."""

    @property
    def prefill_tokens_per_output(self) -> float:
        """Prompt tokens to compute for every output token."""
        return self.input_tokens * (1.0 - self.cached) / self.output_tokens

    @property
    def mean_context(self) -> float:
        """Keys that a decoding row reads, averaged over its life."""
        return self.input_tokens + self.output_tokens / 2


def parse_traffic_mix(text: str) -> TrafficMix:
    """Parse `in=1020,out=129,rows=32,cached=0.25`; what is left out keeps its default. Raises InvalidTrace."""
    values: dict[str, float] = {}
    for part in text.split(","):
        key, _, value = (x.strip() for x in part.partition("="))
        if key not in _KEYS:
            raise InvalidTrace(f"traffic mix {text!r}: {key!r} is not one of {', '.join(_KEYS)}; write in=1020,out=129")
        if key in values:
            raise InvalidTrace(f"traffic mix {text!r}: {key} is given twice; give it once")
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        low, high = (0.0, 0.999) if key == "cached" else (1.0, 1e7)
        if not low <= number <= high:
            raise InvalidTrace(f"traffic mix {text!r}: {key}={value!r} must be a number from {low:g} to {high:g}")
        if key == "rows" and number != int(number):
            raise InvalidTrace(f"traffic mix {text!r}: rows={value!r} must be a whole number")
        values[key] = number
    rows = int(values.pop("rows", TrafficMix().decode_rows))
    return TrafficMix(decode_rows=rows, **{_KEYS[k]: v for k, v in values.items()})
