"""Replays and back-tests of recordings that the simulator wrote: what must be equal is equal to the nanosecond."""

import json
import random
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.workload.recordings import header, write_recording
from typer.testing import CliRunner

from evener.cli.main import app
from evener.cost.base import BatchShape
from evener.cost.fitted import KNOTS, Corrections, Factors, corrected
from evener.engine.events import Answer
from evener.engine.request import Request
from evener.errors import InvalidInput
from evener.execute.live.record import Entry, Recorder, Timing, read_record
from evener.execute.sim.traffic import Failure, SimRequest
from evener.units import Nanoseconds
from evener.workload.backtest import achieved, others_took, predicted, read_traffic, set_beside
from evener.workload.calibrate import observe
from evener.workload.replay import recorded_costs, replay
from evener.workload.slo import Slo

FOUR = ("cpu:0", "cpu:1", "cpu:0#1,slowdown=2", "cpu:1#1")
DP = header(FOUR[:2], 1, 1, 2)
LAYOUTS = {"one": (1, 1, 1), "tp": (2, 1, 1), "pp": (1, 2, 1), "dp": (1, 1, 2), "all": (2, 1, 2)}


def traffic(seed: int, n: int, gap: float = 2e6, leave: bool = False) -> list[SimRequest]:
    rng, at, out = random.Random(seed), 0, []
    for k in range(n):
        at += int(rng.expovariate(1) * gap)
        most = rng.randint(1, 60)
        left = Nanoseconds(at + int(rng.expovariate(1) * 3e7)) if leave and rng.random() < 0.3 else None
        asked = Request(f"r{k}", rng.randint(1, 150), most)
        out.append(SimRequest(asked, Nanoseconds(at), rng.randint(0, 80), left))
    return out


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 10_000), st.integers(1, 30), st.sampled_from([16, 200]),
       st.sampled_from(["equal-time", "fcfs", "static"]), st.booleans())  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_law_4_and_the_ledger_are_rebuilt(
    tmp_path_factory: pytest.TempPathFactory, layout: str, seed: int, n: int, kv_blocks: int, policy: str, leave: bool
) -> None:
    """Same commands; and the ledger of the replay is that of the run, in every counter."""
    path = tmp_path_factory.mktemp("replay") / "run.evener"
    tp, pp, dp = LAYOUTS[layout]
    written, costs = header(FOUR, tp, pp, dp, kv_blocks, policy=policy, static_batch=4)
    _, ledger = write_recording(path, written, costs, traffic(seed, n, leave=leave))
    done = replay(path)
    assert done.difference is None and done.steps >= n
    if done.ledger is None:  # everybody left before anything ran
        assert done.batches == 0 and leave
    else:
        assert done.ledger.account() == ledger.account()


@pytest.mark.parametrize(("dtype", "kv_dtype"), [("int8", "int8"), ("fp32", "bf16"), ("int8", "fp32")])
def test_a_replay_knows_the_dtypes(tmp_path: Path, dtype: str, kv_dtype: str) -> None:
    """Of weights and of KV: what batches take, and with it chunks and routes, follows from both."""
    path = tmp_path / "run.evener"
    written, costs = header(FOUR, 1, 1, 2, dtype=dtype, kv_dtype=kv_dtype)
    _, ledger = write_recording(path, written, costs, traffic(3, 30))
    shape = BatchShape(decode_rows=8, decode_context=100_000, sampled_rows=8)
    assert recorded_costs(written).batch_ns(0, shape) == costs.batch_ns(0, shape)
    done = replay(path)
    assert done.difference is None and done.ledger is not None
    assert done.ledger.account() == ledger.account()


@given(st.sampled_from(sorted(LAYOUTS)), st.integers(0, 10_000), st.integers(1, 30))
@settings(max_examples=12, deadline=None)
def test_the_back_test_of_a_perfect_cost_model_is_exact(
    tmp_path_factory: pytest.TempPathFactory, layout: str, seed: int, n: int
) -> None:
    """Where batches take just what the model says, every figure that is predicted was achieved."""
    path = tmp_path_factory.mktemp("backtest") / "run.evener"
    written, costs = header(FOUR, *LAYOUTS[layout])
    # The clock of a recording begins long before its first request.
    late = [msgspec.structs.replace(r, arrival=Nanoseconds(r.arrival + 10**9)) for r in traffic(seed, n)]
    write_recording(path, written, costs, late)
    read = read_traffic(path)
    did, said = achieved(read, replay(path)), predicted(read, recorded_costs(read.header))
    for line in set_beside(said, did):
        # A window may begin inside one of the ledger's checkpoints, whose causes are then taken in proportion.
        assert line.predicted == pytest.approx(line.achieved, abs=0.5 if line.share else 1e-6), line


def test_a_fit_finds_what_the_model_did_not_know(tmp_path: Path) -> None:
    """Batches take 1.5 times as long as the model says: fitted on other requests, the prediction is right."""
    written, costs = header(FOUR[:2], 2, 1, 1)
    truth_header, truth = header([f"{d},slowdown=1.5" for d in FOUR[:2]], 2, 1, 1)
    assert truth_header.plan == written.plan
    write_recording(tmp_path / "fit", written, costs, traffic(1, 60), truth=truth)
    write_recording(tmp_path / "test", written, costs, traffic(2, 60), truth=truth)
    read, run = read_traffic(tmp_path / "test"), replay(tmp_path / "test")
    did = achieved(read, run)
    before = {x.what: x for x in set_beside(predicted(read, costs), did)}
    after = {x.what: x for x in set_beside(predicted(read, observe(tmp_path / "fit").fit(1)), did)}
    assert before["output tok/s"].error is not None and before["output tok/s"].error > 0.2
    for what in ("output tok/s", "TTFT mean, ms", "TPOT mean, ms", "E2E p90, ms"):
        assert after[what].error == pytest.approx(0, abs=0.03), after[what]


def test_several_recordings_make_one_fit(tmp_path: Path) -> None:
    """All their batches count; those of another plan are refused by name."""
    written, costs = header(FOUR[:2], 2, 1, 1)
    for k in range(2):
        write_recording(tmp_path / f"fit{k}", written, costs, traffic(k, 40))
    paths = [tmp_path / "fit0", tmp_path / "fit1"]
    each = [observe(path).corrections().batches for path in paths]
    assert observe(*paths).corrections().batches == sum(each)
    write_recording(tmp_path / "other", *header(FOUR[:2], 1, 2, 1), traffic(1, 40))
    with pytest.raises(InvalidInput, match="other is of another plan"):
        observe(*paths, tmp_path / "other")


def test_a_back_test_decides_as_the_run_did(tmp_path: Path) -> None:
    """Chunks were cut by what the run believed of its devices, whatever is known of them by now."""
    written, believed = header(FOUR[:2], 1, 2, 1)
    dear = Factors(rows=tuple(6.0 if rows < 64 else 1.0 for rows in KNOTS))
    truth = corrected(believed, Corrections(dict.fromkeys(FOUR[:2], dear)), 1)
    write_recording(tmp_path / "run", written, believed, traffic(5, 60), truth=truth)
    read = read_traffic(tmp_path / "run")
    did, said = achieved(read, replay(tmp_path / "run")), predicted(read, truth)
    for line in set_beside(said, did):
        assert line.predicted == pytest.approx(line.achieved, abs=0.5 if line.share else 1e-6), line


def test_what_others_took_slows_a_prediction_down(tmp_path: Path) -> None:
    """Two workers on one core lose it half of the time: each takes twice as long; alone, nobody takes anything."""
    shared, alone = header(("cpu:0", "cpu:0#1"), 1, 1, 2), header(FOUR[:2], 1, 1, 2)
    for name, (written, costs) in (("shared", shared), ("alone", alone)):
        write_recording(tmp_path / name, written, costs, traffic(9, 30, gap=1e4))
    read = read_traffic(tmp_path / "shared")
    took = others_took(read, replay(tmp_path / "shared"))
    assert {s.device for s in took} == {"cpu:0", "cpu:0#1"}
    assert all(s.factor == pytest.approx(2, abs=0.01) for s in took if s.factor != 1)
    assert others_took(read_traffic(tmp_path / "alone"), replay(tmp_path / "alone")) == []
    free = predicted(read, recorded_costs(read.header)).report.duration_s
    assert predicted(read, recorded_costs(read.header), slow_downs=took).report.duration_s > 1.2 * free


def test_a_lost_worker_is_part_of_the_prediction(tmp_path: Path) -> None:
    path = tmp_path / "run"
    written, costs = header(FOUR[:2], 1, 1, 2)
    write_recording(path, written, costs, traffic(3, 20), failures=[Failure("cpu:1", Nanoseconds(20_000_000))])
    read = read_traffic(path)
    assert [f.device for f in read.failures] == ["cpu:1"]
    did, said = achieved(read, replay(path)), predicted(read, costs)
    assert said.report == did.report and did.report.completed == 20
    assert {x.what: x for x in set_beside(said, did)}["down, %"].achieved > 1


def test_what_is_skipped_and_what_is_bound(tmp_path: Path) -> None:
    path = tmp_path / "run"
    written, costs = DP
    write_recording(path, written, costs, traffic(4, 12))
    assert [r.request.request_id for r in read_traffic(path, skip=5).requests] == [f"r{k}" for k in range(5, 12)]
    read = read_traffic(path)
    every, none = (achieved(read, replay(path), Slo(e2e_ms=ms)).report.goodput_req_s for ms in (1e9, 1e-6))
    assert every > 0 and none == 0
    with pytest.raises(InvalidInput, match="12 requests, 12 are skipped"):
        read_traffic(path, skip=12)


def test_what_ran_meanwhile_loads_the_prediction_too(tmp_path: Path) -> None:
    """Skipped requests that run still, and those whose end a cut recording does not have: predicted beside the
    others, and not counted among them."""
    path, cut = tmp_path / "run", tmp_path / "cut"
    written, costs = DP
    todo = [SimRequest(Request(f"r{k}", 100, 60), Nanoseconds(k * 1_000_000), 60) for k in range(8)]
    write_recording(path, written, costs, todo)
    late = read_traffic(path, skip=4)
    assert [r.request.request_id for r in late.around] == ["r0", "r1", "r2", "r3"]
    recorder = Recorder(cut)
    for record in read_record(path):
        ends = isinstance(record, Entry) and any(
            isinstance(c, Answer) and c.finish and c.request_id in ("r6", "r7") for c in record.commands
        )
        if ends:
            break
        recorder.add(record)
    recorder.close()
    whole = read_traffic(cut)
    assert {r.request.request_id for r in whole.around} >= {"r6"}
    assert all(r.ended is not None for r in whole.requests)
    said = predicted(whole, recorded_costs(whole.header))
    assert said.report.requests == said.report.completed == len(whole.requests)
    assert said.report.duration_s == pytest.approx(achieved(whole, replay(cut)).report.duration_s, rel=0.02)


def tampered(source: Path, target: Path) -> int:
    """A recording with one answer changed; returns its step."""
    out, step, at = Recorder(target), 0, -1
    for kept in read_record(source):
        if isinstance(kept, Entry):
            if at < 0 and step > 10 and any(isinstance(c, Answer) and c.count for c in kept.commands):
                at = step
                changed = [
                    msgspec.structs.replace(c, count=c.count + 1) if isinstance(c, Answer) else c for c in kept.commands
                ]
                kept = Entry(kept.now, kept.event, changed)
            step += 1
        out.add(kept)
    out.close()
    return at


def test_the_command(tmp_path: Path) -> None:
    path, other = tmp_path / "run", tmp_path / "other"
    written, costs = header(FOUR[:2], 1, 2, 1)
    write_recording(path, written, costs, traffic(5, 60))
    write_recording(other, written, costs, traffic(6, 60))
    run = CliRunner()
    done = run.invoke(app, ["replay", str(path)])
    assert done.exit_code == 0 and "the same decisions" in done.stdout and "bubble" in done.stdout
    done = run.invoke(app, ["replay", str(path), "--with-cost-model", "fitted", "--fit-on", str(other), "--json"])
    figures = json.loads(done.stdout)
    assert figures["difference"] is None and figures["requests"] == 60
    beside = {x["what"]: x for x in figures["figures"]}
    assert abs(beside["output tok/s"]["error"]) < 0.05
    step = tampered(path, tmp_path / "changed")
    done = run.invoke(app, ["replay", str(tmp_path / "changed")])
    assert done.exit_code == 1 and f"step {step}," in done.stdout and "replayed: Answer" in done.stdout


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--skip", "1"], "give --with-cost-model"),
        (["--with-cost-model", "nix"], "not one of recorded"),
        (["--with-cost-model", "default", "--fit-on", "x"], "--fit-on is for"),
    ],
)
def test_flags_that_mean_nothing_are_refused(tmp_path: Path, flags: list[str], says: str) -> None:
    path = tmp_path / "run"
    write_recording(path, *DP, traffic(7, 3))
    done = CliRunner().invoke(app, ["replay", str(path), *flags])
    assert isinstance(done.exception, InvalidInput) and says in done.exception.message


def test_a_recording_without_spans_has_no_ledger(tmp_path: Path) -> None:
    path, bare = tmp_path / "run", tmp_path / "bare"
    write_recording(path, *DP, traffic(8, 3))
    out = Recorder(bare)
    for kept in read_record(path):
        if not isinstance(kept, Timing):
            out.add(kept)
    out.close()
    assert replay(bare).ledger is None and replay(bare).difference is None
    with pytest.raises(InvalidInput, match="no spans"):
        observe(bare)
    with pytest.raises(InvalidInput, match="no ledger"):
        achieved(read_traffic(bare), replay(bare))
