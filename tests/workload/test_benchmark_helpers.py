"""What benchmark scripts rely on: servers come and go, rounds alternate, ratios are taken within a round."""

import importlib.util
import os
import sys
import urllib.request
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import common  # noqa: E402
import workload_w  # noqa: E402

SERVER = """
import http.server, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == '/health' else 404)
        self.end_headers()
http.server.HTTPServer(('127.0.0.1', int(sys.argv[1])), Handler).serve_forever()
"""


def peers() -> ModuleType:
    path = common.SHARED / "peers" / "common.py"
    if not path.exists():
        pytest.skip(f"no {path}")
    spec = importlib.util.spec_from_file_location("peers_common", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_workload_w_has_its_totals() -> None:
    assert workload_w.totals() == (15_793, 8_328)


def test_workload_w_is_the_peers_workload() -> None:
    from evener.workload.traffic import Traffic, make_requests

    theirs = peers().workload()
    ours = make_requests(Traffic(token_ids="100:40000"))
    assert [r.prompt for r in ours] == [r["ids"] for r in theirs]
    assert [r.output_tokens for r in ours] == [r["out"] for r in theirs]
    arrivals = make_requests(Traffic(token_ids="100:40000", rate=0.6))
    assert [r.arrival_s for r in arrivals] == pytest.approx(peers().arrivals(64, 0.6).tolist())
    assert [r.prompt for r in arrivals] == [r.prompt for r in ours]


def test_a_server_is_started_and_stopped() -> None:
    target = common.Target("plain", (sys.executable, "-c", SERVER, "{port}"))
    with target.serving() as url, urllib.request.urlopen(f"{url}/health") as response:
        assert response.status == 200
    with pytest.raises(OSError):
        urllib.request.urlopen(f"{url}/health", timeout=1)


def test_a_server_that_does_not_come_up(capfd: pytest.CaptureFixture[str]) -> None:
    dead = common.Target("dead", (sys.executable, "-c", "print('no weights'); raise SystemExit(7)"))
    with pytest.raises(common.BenchmarkFailed, match="dead ended with status 7"), dead.serving():
        pass
    assert "no weights" in capfd.readouterr().err
    deaf = common.Target("deaf", (sys.executable, "-c", "import time; time.sleep(60)"), start_s=0.3)
    with pytest.raises(common.BenchmarkFailed, match="did not answer"), deaf.serving():
        pass


def test_rounds_alternate_and_start_each_time_elsewhere() -> None:
    seen: list[str] = []

    def measure(target: common.Target, url: str) -> dict[str, float]:
        seen.append(target.name)
        return {"x": float(len(seen))}

    targets = [common.Target(name, url="http://127.0.0.1:1") for name in "abc"]
    results = common.alternate(targets, 2, measure)
    assert seen == ["a", "b", "c", "b", "c", "a"]
    assert results["a"] == [{"x": 1.0}, {"x": 6.0}]


def test_ratios_are_taken_within_a_round() -> None:
    # the machine is twice as slow in the second round, which must not show
    results = {"base": [{"v": 10.0}, {"v": 5.0}, {"v": 10.0}], "fast": [{"v": 20.0}, {"v": 10.0}, {"v": 30.0}]}
    assert common.ratios(results, "v", "base") == {"base": 1.0, "fast": 2.0}


def test_peers_are_spelt() -> None:
    assert common.peer("v=http://h:1").url == "http://h:1"
    assert common.peer("v=vllm serve 'a b' --port {port}").command == ("vllm", "serve", "a b", "--port", "{port}")
    for bad in ("http://h:1", "v=", "=x", "v=vllm serve"):
        with pytest.raises(SystemExit, match="--peer"):
            common.peer(bad)


def test_tables() -> None:
    table = common.markdown(["layout", "tok/s"], [["one", 123.456], ["tp2", 1234.5], ["none", None]])
    assert table.splitlines() == [
        "| layout | tok/s |",
        "|--------|-------|",
        "| one    | 123.5 |",
        "| tp2    | 1234  |",
        "| none   | -     |",
    ]


def test_the_machine_is_described() -> None:
    described = common.machine()
    assert described["cores"] == len(os.sched_getaffinity(0)) and described["cpu"] and described["when"]
