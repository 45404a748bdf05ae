"""Traffic in one option: a trace file, or `rate=4,in=lognormal:180:0.8,out=uniform:16:256,requests=300`.

Keys: `rate` (requests per second; left out: all at once), `in` and `out` (lengths, spelt as in `evener bench`),
`requests`, `burstiness`, `seed`; for a trace `trace=FILE` with `scale` (times as fast), `context` (lengths scaled so
that the longest request fits), `requests`. Prompts are not drawn: planning and simulation need lengths only.
"""

import math
from pathlib import Path

import numpy as np
from msgspec import Struct

from evener.errors import InvalidTrace
from evener.workload import arrivals
from evener.workload.lengths import parse_lengths
from evener.workload.trace import Trace, TraceRow, read_trace
from evener.workload.traffic import DEFAULT_INPUT, DEFAULT_OUTPUT

DEFAULT_REQUESTS = 400
MOST_REQUESTS = 10_000_000
"""They are drawn at once; beyond, memory would go first."""
_KEYS = ("rate", "in", "out", "requests", "burstiness", "seed", "trace", "scale", "context")
_OF_A_TRACE = ("trace", "scale", "context", "requests")


class Arrivals(Struct, frozen=True):
    """Requests with their arrivals, and the rate behind them."""

    trace: Trace
    rate: float | None
    """Requests per second; None: all at once, as many as can be served."""


def parse_traffic(text: str) -> Arrivals:
    """The requests that a spelling asks for; the same text gives the same requests. Raises InvalidTrace."""
    if "=" not in text:
        text = f"trace={text}"
    values: dict[str, str] = {}
    for part in text.split(","):
        key, equals, value = (x.strip() for x in part.partition("="))
        if not equals or key not in _KEYS:
            raise InvalidTrace(
                f"traffic {text!r}: {key!r} is not one of {', '.join(_KEYS)}; write a trace file, or "
                "rate=4,in=lognormal:180:0.8,out=128"
            )
        if key in values:
            raise InvalidTrace(f"traffic {text!r}: {key} is given twice; give it once")
        values[key] = value
    return _traced(values) if "trace" in values else _drawn(values)


def _traced(values: dict[str, str]) -> Arrivals:
    for key in values:
        if key not in _OF_A_TRACE:
            raise InvalidTrace(f"traffic: a trace brings its own {key}; leave it out, or leave out the trace")
    path = Path(values["trace"])
    trace = read_trace(path, arrivals=_has_arrivals(path))
    if "requests" in values:
        trace = trace.first(int(_number(values, "requests", 1, whole=True)))
    if "context" in values:
        trace = trace.within(int(_number(values, "context", 2, whole=True)))
    trace = trace.from_zero()
    if "scale" in values:
        trace = trace.at_rate(_number(values, "scale", 0))
    rate = trace.mean_rate()
    return Arrivals(trace, rate if math.isfinite(rate) else None)


def _has_arrivals(path: Path) -> bool:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return "arrival_s" in file.readline()
    except (OSError, UnicodeDecodeError):
        return True  # read_trace says what is wrong with the file


def _drawn(values: dict[str, str]) -> Arrivals:
    for key in ("scale", "context"):
        if key in values:
            raise InvalidTrace(f"traffic: {key} is for a trace; give trace=FILE, or leave it out")
    n = int(_number(values, "requests", 1, whole=True)) if "requests" in values else DEFAULT_REQUESTS
    seed = int(_number(values, "seed", 0, whole=True)) if "seed" in values else 0
    rng = np.random.default_rng(seed)
    inputs = parse_lengths(values.get("in", DEFAULT_INPUT), "in").draw(n, rng)
    outputs = parse_lengths(values.get("out", DEFAULT_OUTPUT), "out").draw(n, rng)
    rate = None
    times = arrivals.at_once(n)
    if "rate" in values and values["rate"] != "inf":
        rate = _number(values, "rate", 0)
        burstiness = _number(values, "burstiness", 0) if "burstiness" in values else 1.0
        # The stream that `evener bench` draws arrivals from.
        times = arrivals.gamma(n, rate, burstiness, np.random.default_rng(seed + 1000))
    elif "burstiness" in values:
        raise InvalidTrace("traffic: burstiness shapes the arrivals of a rate; give rate= too")
    rows = tuple(TraceRow(float(t), int(i), int(o)) for t, i, o in zip(times, inputs, outputs, strict=True))
    return Arrivals(Trace(rows), rate)


def _number(values: dict[str, str], key: str, least: float, whole: bool = False) -> float:
    try:
        value = float(values[key])
    except ValueError:
        value = math.nan
    if key == "requests" and MOST_REQUESTS < value < math.inf:
        raise InvalidTrace(f"traffic: requests={values[key]!r} exceeds the limit of {MOST_REQUESTS}; give fewer")
    if not math.isfinite(value) or value < least or (value == 0 and not whole) or (whole and value != int(value)):
        kind = "whole number" if whole else "positive number"
        raise InvalidTrace(
            f"traffic: {key}={values[key]!r} must be a {kind}{f' of at least {least:g}' if least else ''}"
        )
    return value
