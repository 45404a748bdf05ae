"""`evener bench` as a user runs it."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from scripted_server import Script, free_port, serving
from typer.testing import CliRunner

from evener.cli.bench import bench
from evener.engine.events import Answer
from evener.engine.request import Request
from evener.errors import EvenerError

app = typer.Typer()
app.command()(bench)
KEYS = {"requests", "completed", "failed", "duration_s", "output_tok_s", "total_tok_s", "goodput_req_s"}


@pytest.fixture
def script() -> Script:
    return Script()


@pytest.fixture
def url(script: Script) -> Iterator[str]:
    with serving(script) as address:
        yield address


def run(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, args, catch_exceptions=True)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def figures(*args: str) -> dict[str, Any]:
    code, out = run(*args, "--json")
    assert code == 0
    parsed: dict[str, Any] = json.loads(out)
    return parsed


SMALL = ("--input-tokens", "5", "--output-tokens", "3")


def test_json_has_the_promised_keys(url: str, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    got = figures("--url", url, "--requests", "4", *SMALL, "--slo", "ttft=1000s", "--output", str(path))
    assert got.keys() >= KEYS
    for key in ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms"):
        assert got[key]["p50"] <= got[key]["p90"] <= got[key]["p99"]
    assert (got["requests"], got["completed"], got["failed"]) == (4, 4, 0)
    assert got["goodput_req_s"] == pytest.approx(4 / got["duration_s"])
    assert got["settings"]["model"] == "tiny" and got["settings"]["input_tokens"] == "5"
    records = json.loads(path.read_text())["records"]
    assert [r["index"] for r in records] == [0, 1, 2, 3]


def test_the_seed_decides_what_is_sent(url: str, script: Script) -> None:
    for seed in ("1", "1", "2"):
        figures("--url", url + "/v1/", "--requests", "3", "--concurrency", "1", *SMALL, "--seed", seed)
    prompts = [b["prompt"] for b in script.bodies]
    assert prompts[:3] == prompts[3:6] != prompts[6:]


def test_trace_replayed_sliced_scaled(url: str, script: Script, tmp_path: Path) -> None:
    trace = tmp_path / "t.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,30,10\n2,60,20\n4,6000,20\n")
    args = ("--url", url, "--trace", str(trace), "--requests", "2")
    got = figures(*args, "--rate-scale", "40", "--context", "40")
    assert got["arrival_req_s"] == pytest.approx(20, rel=0.5)
    assert sorted((len(b["prompt"]), b["max_tokens"]) for b in script.bodies) == [(15, 5), (30, 10)]
    script.bodies.clear()
    assert figures(*args, "--concurrency", "2")["completed"] == 2
    assert sorted(len(b["prompt"]) for b in script.bodies) == [30, 60]
    path = tmp_path / "out.json"
    figures(*args, "--rate", "inf", "--output", str(path))
    assert [r["scheduled_s"] for r in json.loads(path.read_text())["records"]] == [0.0, 0.0]


def test_arrival_rate(url: str) -> None:
    got = figures("--url", url, "--requests", "20", "--rate", "200", "--burstiness", "inf", *SMALL)
    assert got["completed"] == 20
    # arrivals cannot come early; how late the client is depends on the machine
    assert got["arrival_req_s"] <= 250
    assert got["lateness_ms"]["p50"] >= 0


def test_warm_up_is_sent_first_and_not_counted(url: str, script: Script) -> None:
    script.modes = ["500", "ok"]
    got = figures("--url", url, "--requests", "2", "--warm-up", "1", "--input-tokens", "5", "--output-tokens", "9")
    assert (got["requests"], got["completed"]) == (2, 2)
    assert [b["max_tokens"] for b in script.bodies] == [8, 9, 9]
    assert script.bodies[0]["prompt"] not in [b["prompt"] for b in script.bodies[1:]]


def test_text_prompts_and_eos(url: str, script: Script) -> None:
    figures("--url", url, "--requests", "1", "--prompts", "text", "--no-ignore-eos", *SMALL)
    assert len(script.bodies[0]["prompt"].split()) == 5
    assert "ignore_eos" not in script.bodies[0]


def test_table_names_failures(url: str, script: Script) -> None:
    script.modes = ["429", "ok"]
    code, out = run("--url", url, "--requests", "2", "--concurrency", "1", *SMALL, "--progress")
    assert code == 0
    assert "1 completed, 1 failed of 2" in out
    assert "http_429" in out and "scripted 429" in out
    assert "TTFT" in out


def test_exit_code_when_nothing_completes(url: str, script: Script) -> None:
    script.modes = ["500"]
    code, out = run("--url", url, "--requests", "2", *SMALL, "--json")
    assert code == 1
    assert json.loads(out)["failures"] == {"http_500": 2}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--rate", "1", "--concurrency", "1"), "exclude each other"),
        (("--rate", "0"), "rate 0.0"),
        (("--rate", "1", "--burstiness", "0"), "burstiness 0.0"),
        (("--burstiness", "2"), "give --rate too"),
        (("--rate-scale", "2"), "give --trace"),
        (("--context", "100"), "give --trace"),
        (("--trace", "/nowhere.csv"), "cannot read the trace"),
        (("--trace", "/nowhere.csv", "--input-tokens", "5"), "its own lengths"),
        (("--trace", "/nowhere.csv", "--rate", "1", "--rate-scale", "2"), "--rate-scale"),
        (("--input-tokens", "none"), "--input-tokens 'none'"),
        (("--output-tokens", "0"), "--output-tokens '0'"),
        (("--token-ids", "9:1"), "--token-ids '9:1'"),
        (("--prompts", "images"), "neither ids nor text"),
        (("--slo", "ttft=5"), "ttft=200ms"),
        (("--offline", "--prompts", "text"), "leave --prompts at ids"),
        (("--offline", "--no-ignore-eos"), "--no-ignore-eos"),
        (("--devices", "cpu:0"), "--devices: a running server has its own"),
        (("--max-num-seqs", "64"), "--max-num-seqs: a running server has its own"),  # its default, and yet said
        (("--offline", "--url", "http://127.0.0.1:8000"), "--url: --offline asks no server"),
        (("--offline", "--api-key", "x"), "--api-key: --offline asks no server"),
        (("here", "-tp", "1", "--start-timeout", "9"), "MODEL, --tensor-parallel-size, --start-timeout: a running"),
        (("--offline", "here", "--model", "there"), "differ"),
        (("--offline", "--policy", "magic"), "magic"),
        (("--input-tokens", "4096", "--output-tokens", "1"), "4096 + 1 = 4097 tokens, the model's context is 4096"),
        (("--model", "huge"), "it serves: tiny"),
        (("--output", "/nowhere/x.json"), "there is no directory /nowhere; make it first"),
        (("--output", "/"), "is a directory"),
    ],
)
def test_bad_options_say_what_and_why(url: str, script: Script, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(EvenerError) as error:
        run(*(() if "--offline" in args else ("--url", url)), *args)
    assert message in error.value.message
    assert not script.bodies


def test_no_server() -> None:
    with pytest.raises(EvenerError, match="start one or give --url"):
        run("--url", f"http://127.0.0.1:{free_port()}")


class FakeEngine:
    """Answers every request at once."""

    model = SimpleNamespace(vocab=500)
    max_model_len = 64
    closed = 0

    async def submit(self, request: Request) -> AsyncIterator[Answer]:
        yield Answer(request.request_id, [1] * request.max_tokens, request.max_tokens, finish="length")

    async def close(self) -> None:
        self.closed += 1


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> FakeEngine:
    fake = FakeEngine()

    async def start_engine(**options: Any) -> FakeEngine:
        assert (options["model"], options["tensor_parallel_size"]) == ("tiny.gguf", 2)
        return fake

    monkeypatch.setattr("evener.api.start_engine", start_engine)
    return fake


OFFLINE = ("--offline", "tiny.gguf", "-tp", "2", *SMALL, "--requests", "3")


def test_offline(engine: FakeEngine) -> None:
    got = figures(*OFFLINE, "--token-ids", "100:500", "--rate", "1000")
    assert (got["completed"], got["input_tokens"], got["output_tokens"]) == (3, 15, 9)
    assert got["settings"]["target"] == "offline" and got["settings"]["model"] == "tiny.gguf"
    assert engine.closed == 1


@pytest.mark.parametrize(
    ("args", "message"),
    [((), "beyond the model's 500"), (("--token-ids", "0:500", "--input-tokens", "62"), "62 + 3 = 65 tokens")],
)
def test_offline_refuses_what_the_model_cannot_take(engine: FakeEngine, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(EvenerError) as error:
        run(*OFFLINE, *args)
    assert message in error.value.message
    assert engine.closed == 1


def test_a_server_is_named_with_url() -> None:
    with pytest.raises(EvenerError, match=r"write --url http://127\.0\.0\.1:9"):
        run("http://127.0.0.1:9", "--requests", "1")
    with pytest.raises(EvenerError, match=r"no server at \S+: .*Connect call failed.*; start one or give --url"):
        run("--url", "http://127.0.0.1:9", "--requests", "1")


@pytest.mark.slow
def test_ctrl_c_reports_what_was_done(url: str, script: Script) -> None:
    script.modes = ["ok", "ok", "hang"]
    command = [sys.executable, "-c", "from evener.cli.main import main; main()", "bench", "--url", url, "--json"]
    process = subprocess.Popen(
        [*command, "--requests", "5", "--concurrency", "1", *SMALL], stdout=subprocess.PIPE, text=True
    )
    try:
        while len(script.bodies) < 3:
            assert process.poll() is None
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    got = json.loads(out)
    assert process.returncode == 130
    assert got["interrupted"] and got["completed"] == 2 and got["failures"] == {"unfinished": 3}
