"""The ledger for other tools: a trace for Perfetto or chrome://tracing.

The trace follows the Trace Event Format (Google, 2016): replicas are processes, devices their threads. Times are
microseconds since the ledger's start.
"""

from collections.abc import Iterator
from typing import Any

from evener.ledger.book import DeviceBook, TracedSpan
from evener.ledger.causes import Cause
from evener.ledger.ledger import Ledger
from evener.ledger.spans import Milestone, Op
from evener.units import Nanoseconds

Event = dict[str, Any]


def chrome_trace(ledger: Ledger, since: Nanoseconds | None = None, until: Nanoseconds | None = None) -> Event:
    """What is still kept of the window [since, until), as a JSON object.

    Spans with what they consist of (and their segments, if recorded), gaps with their cause, milestones of requests.
    Empty of spans and gaps where the ledger was made with `keep_spans=0`.
    """
    low = ledger.start if since is None else since
    high = ledger.now if until is None else until
    events: list[Event] = []
    for replica, books in enumerate(ledger.books()):
        events.append(_name("process_name", replica, 0, f"replica {replica}"))
        events.append(_name("thread_name", replica, 0, "requests"))
        for tid, book in enumerate(books, 1):
            events.append(_name("thread_name", replica, tid, f"{book.device} (stage {book.stage})"))
            events += _device(book, replica, tid, ledger.start, low, high)
    for request_id in ledger.requests():
        for step in ledger.steps(request_id):
            if low <= step.now < high:
                name = Milestone(step.what).name.lower()
                args = {"request": request_id, "tokens": step.tokens}
                events.append(
                    {"ph": "i", "s": "t", "name": name, "cat": "request", "pid": step.replica, "tid": 0,
                     "ts": (step.now - ledger.start) / 1000, "args": args}
                )  # fmt: skip
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _name(what: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": what, "pid": pid, "tid": tid, "args": {"name": name}}


def _device(book: DeviceBook, pid: int, tid: int, start: int, low: int, high: int) -> Iterator[Event]:
    def piece(name: str, category: str, began: int, ended: int, args: Event | None = None) -> Event:
        return {"ph": "X", "name": name, "cat": category, "pid": pid, "tid": tid, "ts": (began - start) / 1000,
                "dur": (ended - began) / 1000, "args": args or {}}  # fmt: skip

    for item in book.trace:
        if isinstance(item, TracedSpan):
            span, shape = item.span, item.made_of.shape
            if span.ended <= low or span.began >= high:
                continue
            parts = {
                f"{part}_us": getattr(span, part) / 1000
                for part in ("compute", "contended", "straggler", "transfer", "bubble", "host")
                if getattr(span, part)
            }
            counts = {
                "batch": span.batch_id,
                "epoch": span.epoch,
                "prefill_tokens": shape.prefill_tokens,
                "decode_rows": shape.decode_rows,
                "repeat": span.repeat,
            }
            yield piece(_title(item), "span", span.began, span.ended, {**counts, **parts})
            for part in span.segments:
                op = Op(part.op).name.lower()
                if part.arrived > part.entered:
                    yield piece(f"wait for {op}", "wait", part.entered, part.arrived)
                key = "cpu_ns" if part.op == Op.COMPUTE else "bytes"
                yield piece(op, "segment", part.arrived, part.ended, {key: part.value})
        elif item.ended > low and item.began < high:
            yield piece(Cause(item.cause).label, "gap", item.began, item.ended)


def _title(item: TracedSpan) -> str:
    shape = item.made_of.shape
    parts = [f"prefill {shape.prefill_tokens}"] if shape.prefill_tokens else []
    parts += [f"decode {shape.decode_rows}"] if shape.decode_rows else []
    return " + ".join(parts) + (f" x {item.span.repeat}" if item.span.repeat > 1 else "")
