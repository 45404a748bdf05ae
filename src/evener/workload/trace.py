"""Traffic traces: CSV with `arrival_s,input_tokens,output_tokens`, read and checked.

Other columns are ignored. Times are seconds from an arbitrary zero, never decreasing; lengths are tokens, at
least 1. Every complaint is an InvalidTrace that names the file, the line and the remedy.
"""

import csv
import math
from pathlib import Path

from msgspec import Struct
from msgspec.structs import replace

from evener.errors import InvalidTrace

COLUMNS = ("arrival_s", "input_tokens", "output_tokens")


class TraceRow(Struct, frozen=True):
    """One request of a trace."""

    arrival_s: float
    input_tokens: int
    output_tokens: int


class Trace(Struct, frozen=True):
    """Requests in order of arrival; never empty."""

    rows: tuple[TraceRow, ...]

    def first(self, n: int) -> "Trace":
        """The first `n` requests, or all of them when there are fewer. Raises InvalidTrace for n < 1."""
        if n < 1:
            raise InvalidTrace(f"cannot take the first {n} requests of a trace; ask for at least 1")
        return Trace(self.rows[:n])

    def from_zero(self) -> "Trace":
        """The same, with the first arrival at 0: a slice of a longer trace begins when it is replayed."""
        zero = self.rows[0].arrival_s
        return Trace(tuple(replace(r, arrival_s=r.arrival_s - zero) for r in self.rows)) if zero else self

    def at_rate(self, factor: float) -> "Trace":
        """The same requests `factor` times as fast: arrival times are divided by it. Lengths stay."""
        if not (math.isfinite(factor) and factor > 0):
            raise InvalidTrace(f"rate scale {factor} is not a positive number; 2 sends twice as fast")
        return Trace(tuple(replace(r, arrival_s=r.arrival_s / factor) for r in self.rows))

    def within(self, context: int) -> "Trace":
        """Scale lengths so that every request fits into `context` tokens, input and output together.

        Rule: one factor, `min(1, context / longest)`, where `longest` is the largest input + output of this
        (already sliced) trace, multiplies every length; results are rounded down, and never below 1. So the ratios
        between requests, and between input and output, are kept. A trace that fits is returned unchanged.
        """
        if context < 2:
            raise InvalidTrace(f"a context of {context} tokens holds no request; it takes at least 2")
        longest = max(r.input_tokens + r.output_tokens for r in self.rows)
        if longest <= context:
            return self

        def scale(tokens: int, room: int) -> int:
            return min(room, max(1, tokens * context // longest))

        rows = []
        for r in self.rows:
            output = scale(r.output_tokens, context - 1)
            rows.append(replace(r, input_tokens=scale(r.input_tokens, context - output), output_tokens=output))
        return Trace(tuple(rows))

    def mean_rate(self) -> float:
        """Requests per second between the first and the last arrival; inf when all arrive at once."""
        span = self.rows[-1].arrival_s - self.rows[0].arrival_s
        return (len(self.rows) - 1) / span if span > 0 else math.inf


def read_trace(path: Path, arrivals: bool = True) -> Trace:
    """Read a trace. With `arrivals=False` the column `arrival_s` may be missing (all times are then 0).

    Raises InvalidTrace (no such file, not text, a missing column, a value that is no number, a time that goes back,
    a length below 1, no row), naming the line.
    """
    needed = COLUMNS if arrivals else COLUMNS[1:]
    rows: list[TraceRow] = []
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, skipinitialspace=True)
            have = reader.fieldnames or []
            missing = [c for c in needed if c not in have]
            if missing:
                raise InvalidTrace(
                    f"{path}: line 1: no column {', '.join(missing)} (columns: {', '.join(have) or 'none'}); "
                    f"the header must name {', '.join(needed)}"
                )
            timed = "arrival_s" in have
            before = 0.0
            for record in reader:
                where = f"{path}: line {reader.line_num}"
                at = _number(record["arrival_s"], "arrival_s", where) if timed else 0.0
                if at < before:
                    raise InvalidTrace(f"{where}: arrival_s {at} is before {before}; sort by arrival_s, from 0 up")
                before = at
                lengths = [_tokens(record[c], c, where) for c in COLUMNS[1:]]
                rows.append(TraceRow(at, *lengths))
    except OSError as error:
        raise InvalidTrace(f"cannot read the trace {path}: {error.strerror}; give a readable CSV file") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InvalidTrace(f"{path} is not a CSV text file: {error}") from error
    if not rows:
        raise InvalidTrace(f"{path}: no request after the header; give at least one row")
    return Trace(tuple(rows))


def write_trace(trace: Trace, path: Path) -> None:
    """Write a trace that `read_trace` reads back unchanged."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(COLUMNS)
        writer.writerows((repr(r.arrival_s), r.input_tokens, r.output_tokens) for r in trace.rows)


def _number(text: str | None, column: str, where: str) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InvalidTrace(f"{where}: {column} is {text!r}; it must be a number")
    return value


def _tokens(text: str | None, column: str, where: str) -> int:
    value = _number(text, column, where)
    if value < 1 or value != int(value):
        raise InvalidTrace(f"{where}: {column} is {text!r}; it must be a whole number of tokens, at least 1")
    return int(value)
