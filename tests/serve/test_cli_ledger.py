"""`evener ledger` against a server whose ledger was told a short story."""

import functools
import json
import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake import FakeEngine
from ledger_story import told_engine
from serving import serve

pytestmark = pytest.mark.slow  # a process for every command


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from serve(told_engine())


def ledger(*arguments: str) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "evener.cli", "ledger", *arguments]
    env = os.environ | {"COLUMNS": "100", "NO_COLOR": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=60, check=False)


def test_once(url: str) -> None:
    out = ledger(url, "--once")
    assert out.returncode == 0, out.stderr
    assert "all 10 s since the start" in out.stdout and "cpu:0" in out.stdout and "no_demand 60.0%" in out.stdout
    assert "loses" in out.stdout and "contended" in out.stdout
    assert max(len(line) for line in out.stdout.splitlines()) <= 100


def test_json_has_what_was_promised(url: str) -> None:
    body = json.loads(ledger(url, "--json", "--window", "5").stdout)
    assert body["window_s"] == 5
    device = body["devices"]["cpu:0"]
    assert device["wall_s"] == 5 == sum(device["causes"].values()) and "achieved_over_peak" in device


def test_a_request(url: str) -> None:
    out = ledger(url, "--request", "cmpl-1")
    assert "took 2.000 s" in out.stdout and "prefill" in out.stdout
    gone = ledger(url, "--request", "nobody")
    assert gone.returncode == 2 and "nobody" in gone.stderr and "Traceback" not in gone.stderr


def test_a_trace(url: str, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert ledger(url, "--trace", str(path)).returncode == 0
    assert json.loads(path.read_text())["traceEvents"]
    refused = ledger(url, "--trace", str(tmp_path / "missing" / "trace.json"))
    assert refused.returncode == 2 and "cannot be written" in refused.stderr


def test_live_in_a_terminal(url: str) -> None:
    """It draws, draws again, and ends with Ctrl-C and code 0."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "evener.cli", "ledger", url, "--every", "0.2"]
    env = os.environ | {"COLUMNS": "100", "LINES": "40", "TERM": "xterm-256color"}
    # A shell starts its background jobs deaf to Ctrl-C, and they hand that on.
    hears = functools.partial(signal.signal, signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdin=slave, stdout=slave, stderr=slave, env=env, preexec_fn=hears)
    os.close(slave)
    drawn, deadline = b"", time.monotonic() + 40
    while drawn.count(b"the last") < 3 and time.monotonic() < deadline:
        drawn += os.read(master, 65536)
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 0
    os.close(master)
    assert drawn.count(b"the last") >= 3
    assert b"\x1b[38;2;" in drawn or b"\x1b[38;5;" in drawn, "in colours"


@pytest.mark.parametrize(
    ("target", "code", "words"),
    [("http://127.0.0.1:9", 3, "evener serve"), ("nonsense", 2, "http://127.0.0.1:8000"), ("http://[::", 2, "URL")],
)
def test_where_nobody_answers(target: str, code: int, words: str) -> None:
    out = ledger(target, "--once")
    assert out.returncode == code and words in out.stderr and "Traceback" not in out.stderr


def test_a_server_without_a_ledger_and_one_with_a_key() -> None:
    engine = FakeEngine()
    engine.kept = None
    for url in serve(engine):
        out = ledger(url)
        assert out.returncode == 3 and "--no-ledger" in out.stderr
    for url in serve(told_engine(), key="secret"):
        assert "--api-key" in ledger(url).stderr
        assert ledger(url, "--api-key", "secret").returncode == 0
