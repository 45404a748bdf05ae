"""`evener plan --check` against a real server, and against its recording: the same requests, the same figures."""

import json
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from server import Server
from typer.testing import CliRunner

from evener.cli.main import app

pytestmark = pytest.mark.slow


def complete(server: Server, prompt: str, n: int) -> None:
    body = {"prompt": prompt, "max_tokens": n, "ignore_eos": True, "temperature": 0}
    request = urllib.request.Request(
        server.url + "/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        reply.read()


def check(source: str, *arguments: str) -> dict[str, Any]:
    done = CliRunner().invoke(app, ["plan", "--check", source, "--json", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def test_a_server_and_its_recording(tiny: Path, tmp_path: Path) -> None:
    record, other = tmp_path / "run.evener", tmp_path / "data.yaml"
    other.write_text("replicas: [{stages: [{shards: ['cpu:0']}]}, {stages: [{shards: ['cpu:1']}]}]")
    options = ("-tp", "2", "--devices", "cpu:0 cpu:1", "--kv-dtype", "bf16", "--record", str(record))
    with Server(tiny, tmp_path, *options) as server:
        for k in range(5):
            complete(server, f"Chapter {k} of Charming:", 6 + k)
        live = check(server.url, "--what-if", str(other))
        _, served = server.get("/served")
        assert "Charming" not in json.dumps(served) and str(tiny.parent) not in json.dumps(served)
    recorded = check(str(record), "--what-if", str(other))
    for said in (live, recorded):
        assert (said["requests"], said["around"]) == (5, 0)
        assert (said["dtype"], said["kv_dtype"]) == ("fp32", "bf16")
        assert said["achieved"]["report"]["output_tokens"] == sum(6 + k for k in range(5))
        assert said["predicted"]["report"]["completed"] == said["what_if"]["report"]["completed"] == 5
        assert set(said["what_if"]["account"]["devices"]) == {"cpu:0", "cpu:1"}
    # The prompts are shorter than a KV block: their contents make no difference to the simulation of the recording.
    for whose in ("predicted", "achieved"):
        for name in ("ttft_ms", "tpot_ms", "e2e_ms"):
            ours, theirs = (said[whose]["report"][name]["mean"] for said in (live, recorded))
            assert ours == pytest.approx(theirs, rel=1e-6), (whose, name)
