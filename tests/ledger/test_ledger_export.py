"""Traces and counters for other tools."""

import itertools
import json

import pytest
from tests.ledger.accounts import MS, Teller, plan_of, reduce

from evener.cost.base import BatchShape
from evener.ledger.export import chrome_trace
from evener.ledger.spans import MakeUp, Milestone, Op, Segment
from evener.units import Nanoseconds


def told(keep_spans: int) -> Teller:
    teller = Teller(plan_of((4, 1), (4, 1)), keep_spans=keep_spans)
    teller.state(0)
    teller.ledger.request("r", 0, Nanoseconds(0), Milestone.ARRIVED, 5)
    segments = (
        Segment(Op.COMPUTE, Nanoseconds(1 * MS), Nanoseconds(1 * MS), Nanoseconds(4 * MS), 3 * MS),
        Segment(Op.SEND, Nanoseconds(4 * MS), Nanoseconds(5 * MS), Nanoseconds(6 * MS), 512),
    )
    made_of = MakeUp(BatchShape(prefill_tokens=5, prefill_pairs=15, sampled_rows=1, chunks=1))
    teller.batch(0, {(0, 0): (1, 6, {"bubble": 1, "transfer": 1}), (1, 0): (0, 9, {"bubble": 6})}, made_of=made_of,
                 segments=segments, traffic=reduce(64, 2, 1, 1))  # fmt: skip
    teller.batch(9, {(0, 0): (10, 12, {}), (1, 0): (10, 14, {"bubble": 2})})
    teller.state(14, work=False)
    teller.ledger.settle(Nanoseconds(20 * MS))
    return teller


def test_a_trace_tiles_each_device_with_spans_and_gaps() -> None:
    trace = chrome_trace(told(100).ledger)
    events = json.loads(json.dumps(trace))["traceEvents"]
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    assert names == {(0, 0): "requests", (0, 1): "d0.0.0 (stage 0)", (0, 2): "d0.1.0 (stage 1)"}
    for tid in (1, 2):
        own = [e for e in events if e["tid"] == tid and e.get("cat") in ("span", "gap")]
        assert own[0]["ts"] == 0 and own[-1]["ts"] + own[-1]["dur"] == pytest.approx(20_000)
        assert all(a["ts"] + a["dur"] == pytest.approx(b["ts"]) for a, b in itertools.pairwise(own))
    first = [e["name"] for e in events if e["tid"] == 1 and e.get("cat") in ("span", "gap")]
    assert first == ["host", "prefill 5", "bubble", "host", "decode 8", "bubble", "no_demand"]
    assert [e["name"] for e in events if e.get("cat") in ("segment", "wait") and e["tid"] == 1] == [
        "compute", "wait for send", "send",
    ]  # fmt: skip
    instant = next(e for e in events if e["ph"] == "i")
    assert (instant["name"], instant["ts"], instant["args"]["tokens"]) == ("arrived", 0, 5)


def test_a_window_of_a_trace() -> None:
    events = chrome_trace(told(100).ledger, Nanoseconds(9 * MS), Nanoseconds(13 * MS))["traceEvents"]
    assert [e["name"] for e in events if e.get("cat") == "span"] == ["decode 8", "decode 8"]
    assert not [e for e in events if e["ph"] == "i"]


def test_without_kept_spans_the_trace_has_requests_only() -> None:
    events = chrome_trace(told(0).ledger)["traceEvents"]
    assert {e["ph"] for e in events} == {"M", "i"}
