"""Figures against hand-made records, and the laws that any records obey."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.errors import InvalidInput
from evener.workload.drive import Record, Run
from evener.workload.report import Summary, make_report, summarise
from evener.workload.slo import Slo, parse_slo


def ok(index: int, scheduled: float, sent: float, chunks: list[float], tokens: int | None = None) -> Record:
    n = len(chunks) if tokens is None else tokens
    return Record(index, n, scheduled, sent, chunks[-1], chunks, 10, n, failure=None)


def bad(index: int, reason: str, detail: str) -> Record:
    return Record(index, 5, 0.0, 0.5, 1.0, [0.7], 10, 1, failure=reason, detail=detail)


def test_hand_computed() -> None:
    run = Run(
        [
            ok(0, scheduled=0.0, sent=0.1, chunks=[1.0, 1.2, 1.6]),
            ok(1, scheduled=1.0, sent=1.0, chunks=[1.5]),
            ok(2, scheduled=2.0, sent=2.1, chunks=[2.2, 2.4], tokens=5),
            bad(3, "http_429", "full"),
            bad(4, "http_429", "still full"),
            bad(5, "timeout", "late"),
        ],
        open_loop=True,
        duration_s=4.0,
        client_cpu_s=0.25,
    )
    report = make_report(run, Slo(ttft_ms=600.0, tpot_ms=60.0))
    assert (report.requests, report.completed, report.failed) == (6, 3, 3)
    assert report.output_tok_s == pytest.approx((3 + 1 + 5) / 4)
    assert report.total_tok_s == pytest.approx((9 + 30) / 4)
    assert report.ttft_ms.p50 == pytest.approx(500)  # 1000, 500, 200
    assert report.ttft_ms.mean == pytest.approx(1700 / 3)
    assert report.ttft_ms.p99 == pytest.approx(990)
    assert report.tpot_ms.p50 == pytest.approx((300 + 50) / 2)  # 600 / 2 and 200 / 4; one token has none
    assert report.itl_ms.mean == pytest.approx((200 + 400 + 200) / 3)
    assert report.e2e_ms.mean == pytest.approx((1600 + 500 + 400) / 3)
    assert report.goodput_req_s == pytest.approx(2 / 4)  # request 0 misses TTFT
    assert report.failures == {"http_429": 2, "timeout": 1}
    assert report.failure_examples == {"http_429": "full", "timeout": "late"}
    assert report.lateness_ms.p50 == pytest.approx(300)  # 0, 100, 100, 500, 500, 500
    assert report.arrival_req_s == pytest.approx(5 / 2.0)  # first sent 0.1, last 2.1
    assert report.tokens_per_chunk == pytest.approx(9 / 6)
    assert report.short_outputs == 0
    assert report.client_cpu_s == 0.25


def test_without_slo_all_completed_are_good_and_failures_never() -> None:
    run = Run([ok(0, 0.0, 0.0, [9.0]), bad(1, "timeout", "")], open_loop=True, duration_s=2.0)
    assert make_report(run).goodput_req_s == 0.5
    assert make_report(run, Slo(ttft_ms=8_999.0)).goodput_req_s == 0.0
    assert make_report(run, Slo(ttft_ms=9_000.0)).goodput_req_s == 0.5


def test_short_answers_are_counted() -> None:
    record = ok(0, 0.0, 0.0, [1.0, 2.0])
    record.asked_tokens = 3
    assert make_report(Run([record], open_loop=False, duration_s=2.0)).short_outputs == 1


def test_nothing_completed() -> None:
    report = make_report(Run([bad(0, "connect", "refused")], open_loop=True, duration_s=1.0))
    assert report.ttft_ms == Summary(None, None, None, None)
    assert report.output_tok_s == 0.0
    assert report.tokens_per_chunk is None


def test_closed_loop_has_no_lateness() -> None:
    assert make_report(Run([ok(0, 0.5, 0.6, [1.0])], open_loop=False, duration_s=1.0)).lateness_ms.p50 is None


def test_arrivals_are_those_of_an_open_loop() -> None:
    """In a closed loop the answers set the pace; all at once is no rate, however long sending takes."""
    at = [ok(0, 0.0, 0.0, [1.0]), ok(1, 10.0, 10.0, [11.0])]
    assert make_report(Run(at, open_loop=True, duration_s=11.0)).arrival_req_s == pytest.approx(0.1)
    assert make_report(Run(at, open_loop=False, duration_s=11.0)).arrival_req_s is None
    burst = [ok(0, 0.0, 0.0001, [1.0]), ok(1, 0.0, 0.0002, [1.0])]
    assert make_report(Run(burst, open_loop=True, duration_s=1.0)).arrival_req_s is None


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_are_monotone_and_bounded(values: list[float]) -> None:
    s = summarise(values)
    assert s.p50 is not None and s.p90 is not None and s.p99 is not None and s.mean is not None
    slack = 1e-9 * max(values)
    assert min(values) <= s.p50 + slack and s.p50 <= s.p90 + slack
    assert s.p90 <= s.p99 + slack and s.p99 <= max(values) + slack
    assert min(values) - slack <= s.mean <= max(values) + slack


records = st.builds(
    lambda start, gaps, failure: Record(
        0, len(gaps), start, start, 0.0, [start + sum(gaps[: k + 1]) for k in range(len(gaps))], 7, len(gaps), failure
    ),
    st.floats(0, 100),
    st.lists(st.floats(0, 10), min_size=1, max_size=8),
    st.sampled_from([None, None, "timeout", "http_500"]),
)


@settings(max_examples=60, deadline=None)
@given(st.lists(records, min_size=1, max_size=20), st.floats(0, 1e5))
def test_requests_and_tokens_are_conserved(made: list[Record], bound: float) -> None:
    report = make_report(Run(made, open_loop=True, duration_s=3.0), Slo(ttft_ms=bound))
    assert report.completed + report.failed == report.requests == len(made)
    assert sum(report.failures.values()) == report.failed
    assert report.goodput_req_s * 3.0 <= report.completed + 1e-9
    assert report.output_tokens == sum(r.output_tokens for r in made if r.failure is None)
    if report.completed:
        assert report.ttft_ms.mean is not None and report.e2e_ms.mean is not None
        assert report.ttft_ms.mean <= report.e2e_ms.mean + 1e-6


def test_slo_spelling() -> None:
    assert parse_slo("ttft=200ms,tpot=50ms,e2e=10s") == Slo(200.0, 50.0, 10_000.0)
    assert parse_slo(" tpot = 500us ") == Slo(tpot_ms=0.5)
    assert parse_slo("ttft=1.5s").met(1500.0, None, 1e9)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "METRIC=TIME"),
        ("ttft", "METRIC=TIME"),
        ("itl=5ms", "'itl=5ms'"),
        ("ttft=200", "write ttft=200ms"),
        ("ttft=-1ms", "not a positive time"),
        ("ttft=0ms", "not a positive time"),
        ("ttft=fastms", "not a positive time"),
        ("ttft=1ms,ttft=2ms", "twice"),
        ("ttft=1ms,", "METRIC=TIME"),
    ],
)
def test_bad_slo(text: str, message: str) -> None:
    with pytest.raises(InvalidInput) as error:
        parse_slo(text)
    assert message in error.value.message
