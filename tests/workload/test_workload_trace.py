"""Traces: what is read back is what was written; what is wrong is named with its line."""

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.errors import InvalidTrace
from evener.workload.spec import parse_traffic
from evener.workload.trace import Trace, TraceRow, read_trace, write_trace
from evener.workload.traffic import Traffic, make_requests

SHARED = Path(os.environ.get("EVENER_SHARED", Path(__file__).parents[2].parent / "shared"))

rows = st.builds(
    TraceRow,
    arrival_s=st.floats(0, 1e6),
    input_tokens=st.integers(1, 100_000),
    output_tokens=st.integers(1, 100_000),
)
traces = st.lists(rows, min_size=1, max_size=20).map(lambda r: Trace(tuple(sorted(r, key=lambda x: x.arrival_s))))


@settings(max_examples=40, deadline=None)
@given(trace=traces)
def test_round_trip(tmp_path_factory: pytest.TempPathFactory, trace: Trace) -> None:
    path = tmp_path_factory.mktemp("trace") / "t.csv"
    write_trace(trace, path)
    assert read_trace(path) == trace


@settings(max_examples=60, deadline=None)
@given(trace=traces, context=st.integers(2, 5000))
def test_scaled_lengths_fit_and_keep_order(trace: Trace, context: int) -> None:
    scaled = trace.within(context)
    assert [r.arrival_s for r in scaled.rows] == [r.arrival_s for r in trace.rows]
    assert all(r.input_tokens >= 1 and r.output_tokens >= 1 for r in scaled.rows)
    assert all(r.input_tokens + r.output_tokens <= context for r in scaled.rows)
    by_output = sorted(range(len(trace.rows)), key=lambda k: trace.rows[k].output_tokens)
    ordered = [scaled.rows[k].output_tokens for k in by_output]
    assert ordered == sorted(ordered)


def test_scaling_uses_one_factor() -> None:
    trace = Trace((TraceRow(0.0, 3000, 1000), TraceRow(1.0, 400, 40)))
    assert trace.within(1000).rows == (TraceRow(0.0, 750, 250), TraceRow(1.0, 100, 10))
    assert trace.within(4000) is trace
    with pytest.raises(InvalidTrace, match="context of 1 tokens"):
        trace.within(1)


def test_a_slice_of_a_day_begins_when_it_is_replayed(tmp_path: Path) -> None:
    """The zero of a trace is arbitrary: nobody waits an hour for its first request."""
    path = tmp_path / "slice.csv"
    path.write_text("arrival_s,input_tokens,output_tokens\n3600,5,2\n3602,5,2\n")
    assert read_trace(path).rows[0].arrival_s == 3600.0
    replayed = make_requests(Traffic(trace=path, rate_scale=2.0))
    assert [r.arrival_s for r in replayed] == [0.0, 1.0]
    assert [r.arrival_s for r in parse_traffic(str(path)).trace.rows] == [0.0, 2.0]


def test_rate_and_slices() -> None:
    trace = Trace(tuple(TraceRow(2.0 * k, 1, 1) for k in range(5)))
    assert trace.mean_rate() == pytest.approx(0.5)
    assert trace.at_rate(4).mean_rate() == pytest.approx(2.0)
    assert trace.first(2).rows == trace.rows[:2]
    assert trace.first(99) == trace
    for bad in (0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InvalidTrace, match="rate scale"):
            trace.at_rate(bad)
    with pytest.raises(InvalidTrace, match="at least 1"):
        trace.first(0)


HEAD = "arrival_s,input_tokens,output_tokens\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: no column arrival_s, input_tokens, output_tokens"),
        ("arrival_s,input_tokens\n0,1\n", "line 1: no column output_tokens"),
        (HEAD, "no request after the header"),
        (HEAD + "0,1,1\n2,5,5\n1,5,5\n", "line 4: arrival_s 1.0 is before 2.0"),
        (HEAD + "-1,1,1\n", "line 2: arrival_s -1.0 is before 0"),
        (HEAD + "x,1,1\n", "line 2: arrival_s is 'x'"),
        (HEAD + "nan,1,1\n", "line 2: arrival_s is 'nan'"),
        (HEAD + "0,0,1\n", "line 2: input_tokens is '0'"),
        (HEAD + "0,1,2.5\n", "line 2: output_tokens is '2.5'"),
        (HEAD + "0,1\n", "line 2: output_tokens is None"),
    ],
)
def test_bad_files_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "bad.csv"
    path.write_text(text)
    with pytest.raises(InvalidTrace) as error:
        read_trace(path)
    assert message in error.value.message
    assert str(path) in error.value.message


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidTrace, match="cannot read the trace"):
        read_trace(tmp_path / "absent.csv")
    (tmp_path / "binary.csv").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidTrace, match="not a CSV text file"):
        read_trace(tmp_path / "binary.csv")


def test_other_columns_and_missing_arrivals(tmp_path: Path) -> None:
    path = tmp_path / "t.csv"
    path.write_text("note,output_tokens,input_tokens\nhello,7,3\n")
    assert read_trace(path, arrivals=False).rows == (TraceRow(0.0, 3, 7),)
    with pytest.raises(InvalidTrace, match="no column arrival_s"):
        read_trace(path)


def test_real_traces() -> None:
    path = SHARED / "traces" / "azure2023_conv.csv"
    if not path.exists():
        pytest.skip(f"no {path}")
    trace = read_trace(path)
    assert len(trace.rows) == 19_366
    assert trace.mean_rate() == pytest.approx(5.53, abs=0.01)
    first = trace.first(300).within(2048)
    assert max(r.input_tokens + r.output_tokens for r in first.rows) <= 2048
    read_trace(SHARED / "traces" / "mooncake_conversation.csv")
    assert len(read_trace(SHARED / "traces" / "sharegpt_helix_lengths.csv", arrivals=False).rows) == 82_814
