"""A recording: what it keeps, how it ends, and what is refused."""

import errno
from pathlib import Path

import pytest

from evener.brain import BrainConfig
from evener.cost.base import BatchShape
from evener.engine.events import Cancelled
from evener.errors import InvalidInput, Unavailable
from evener.execute.live.chronicle import Chronicle
from evener.execute.live.fleet import LiveConfig
from evener.execute.live.record import FORMAT, Entry, Recorder, ReplicaUp, Timing, read_record
from evener.execute.live.wire import Spans
from evener.execute.served import Header
from evener.ledger.spans import Span
from evener.spec.cluster import Cluster, parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds as Ns

MODEL = ModelSpec("llama", 40, 8, 1, 1, 1, 8, 16, 64)
PLAN = Plan((Replica((Stage((0, 1), (Shard("cpu:0", (0, 1), (0, 16), (0, 40), (0, 40)),)),)),))
CLUSTER = Cluster((parse_device("cpu:0"),))


class Costs:
    """Nothing takes time."""

    version = 0

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Ns:
        return Ns(0)

    def batch_ns(self, replica: int, shape: BatchShape) -> Ns:
        return Ns(0)

    latency_ns = batch_ns

    def error(self) -> float | None:
        return None


def chronicle(path: Path | str | None, ledger: bool = True) -> Chronicle:
    config = LiveConfig("model", record=None if path is None else str(path), ledger=ledger)
    made = Chronicle(config, PLAN, Costs(), None)
    made.begin(MODEL, CLUSTER, [8], BrainConfig(), {"kind": "free"})
    return made


def story(c: Chronicle) -> Span:
    c.ready("cpu:0")
    c.step(Ns(c.started + 5), Cancelled("nobody"), [])
    span = Span(0, 0, 0, 0, 0, *(Ns(x) for x in (1, 2, 1, 1, 0, 0, 0, 0)))
    c.spans(Spans("cpu:0", (span,), Ns(0), Ns(0)))
    return span


def test_what_was_written_is_read(tmp_path: Path) -> None:
    path = tmp_path / "run"
    c = chronicle(path, ledger=False)
    span = story(c)
    c.close()
    header, up, step, timing = read_record(path)
    assert isinstance(header, Header) and (header.plan, header.kv_blocks) == (PLAN, [8])
    assert (header.model, header.cluster, header.started) == (MODEL, CLUSTER, c.started)
    assert isinstance(up, ReplicaUp) and up.replica == 0
    assert step == Entry(Ns(c.started + 5), Cancelled("nobody"), [])
    assert isinstance(timing, Timing) and timing.spans == (span,) and timing.device == "cpu:0"


def test_a_cut_end_ends_it(tmp_path: Path) -> None:
    path = tmp_path / "run"
    c = chronicle(path, ledger=False)
    story(c)
    c.close()
    path.write_bytes(path.read_bytes()[:-3])
    assert len(list(read_record(path))) == 3


@pytest.mark.parametrize("content", [b"", b"hello, this is text", b"\x01\x00\x00\x00\xc0"])
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "run"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match="no recording"):
        list(read_record(path))


def test_another_format_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "run"
    c = chronicle(path, ledger=False)
    c.close()
    path.write_bytes(path.read_bytes().replace(b"\xa6header" + bytes([FORMAT]), b"\xa6header\x09"))
    with pytest.raises(InvalidInput, match="format 9"):
        list(read_record(path))


def test_a_full_disk_stops_the_recording_and_nothing_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    c = chronicle(tmp_path / "run")

    def full(self: Recorder, kept: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Recorder, "add", full)
    c.step(Ns(c.started), Cancelled("a"), [])
    monkeypatch.undo()
    c.step(Ns(c.started), Cancelled("b"), [])
    [warning] = c.warnings()
    assert "No space left on device" in warning and warning in capsys.readouterr().err
    assert c.ledger().now >= c.started
    c.close()
    assert [type(k) for k in read_record(tmp_path / "run")] == [Header], "nothing follows the gap"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_at_the_end() -> None:
    c = chronicle("/dev/full")
    c.close()
    assert "/dev/full" in c.warnings()[0]
    c.close()


def test_a_ledger_that_fails_is_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    c = chronicle(None)
    assert c.feed is not None
    c.feed.done(0, 99, Ns(c.started), 0)  # a batch that nobody issued
    with pytest.raises(Unavailable, match="the ledger stopped"):
        c.ledger()
    c.feed.done(0, 100, Ns(c.started), 0)
    assert len(c.warnings()) == 1 and "requests are served on" in capsys.readouterr().err


def test_no_ledger() -> None:
    c = chronicle(None, ledger=False)
    assert c.feed is None
    with pytest.raises(Unavailable, match="--no-ledger"):
        c.ledger()
