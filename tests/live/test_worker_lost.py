"""A worker that dies, hangs or fails: its requests end with the reason, nothing hangs, nothing leaks."""

import os
import signal
import threading
import time
from pathlib import Path

import openai
import psutil
import pytest
from tests.live.server import Server

pytestmark = pytest.mark.slow
LONG = {"prompt": "a b c d", "max_tokens": 900, "extra_body": {"ignore_eos": True}}


class Client(threading.Thread):
    """One long request in the background; `error` or `tokens` when it has ended."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.client = openai.OpenAI(base_url=server.url + "/v1", api_key="x", max_retries=0)
        self.error: openai.OpenAIError | None = None
        self.tokens = 0
        self.start()

    def run(self) -> None:
        try:
            reply = self.client.completions.create(model="tiny-llama", **LONG)
            self.tokens = reply.usage.completion_tokens if reply.usage else 0
        except openai.OpenAIError as error:
            self.error = error


def running(server: Server, count: int) -> None:
    deadline = time.monotonic() + 30
    while server.metric("evener_num_requests_running") < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def leftovers(server: Server) -> list[str]:
    sockets = [str(p) for p in server.tmp.rglob("*")]
    segments = [str(p) for p in Path("/dev/shm").glob("*evener*")]
    return sockets + segments


@pytest.mark.parametrize("layout", [("-tp", "2"), ("-pp", "2")], ids=["tp2", "pp2"])
def test_killed_worker(tiny: Path, tmp_path: Path, layout: tuple[str, str]) -> None:
    """503 with device and reason for what ran and what comes; /health says how to go on; a clean end."""
    with Server(tiny, tmp_path, "--devices", "cpu:0 cpu:1", *layout) as server:
        clients = [Client(server) for _ in range(3)]
        running(server, 3)
        workers = server.workers()
        assert len(workers) == 2
        os.kill(workers[1].pid, signal.SIGKILL)
        for client in clients:
            client.join(20)
            assert not client.is_alive(), "a request hangs"
            assert isinstance(client.error, openai.InternalServerError), client.error
            assert client.error.status_code == 503
            assert "cpu:1" in str(client.error) and "SIGKILL" in str(client.error)
        status, body = server.get("/health")
        assert status == 503 and "cpu:1" in str(body) and "restart" in str(body)
        _, ledger = server.get("/ledger")
        assert "SIGKILL" in ledger["replicas"]["0"]["down"]
        for device in ledger["devices"].values():
            assert device["causes"]["down"] > 0
            assert sum(device["causes_ns"]) == round(device["wall_s"] * 1e9)
        late = Client(server)
        late.join(10)
        assert isinstance(late.error, openai.InternalServerError) and late.error.status_code == 503
        psutil.wait_procs(workers, timeout=10)
        assert not [w for w in workers if w.is_running() and w.status() != psutil.STATUS_ZOMBIE], "the peer outlived it"
    assert leftovers(server) == []


def test_dp2_goes_on_without_the_lost_replica(tiny: Path, tmp_path: Path) -> None:
    """Law 7: while another replica can take them, a dead worker loses no accepted request."""
    with Server(tiny, tmp_path, "--devices", "cpu:0 cpu:1", "-dp", "2") as server:
        clients = [Client(server) for _ in range(4)]
        running(server, 4)
        os.kill(server.workers()[0].pid, signal.SIGKILL)
        for client in clients:
            client.join(60)
            assert client.error is None and client.tokens == 900
        status, body = server.get("/health")
        assert status == 200, body
    assert leftovers(server) == []


def test_hung_worker(tiny: Path, tmp_path: Path) -> None:
    """A stopped process answers nothing; after --worker-timeout it counts as lost."""
    with Server(tiny, tmp_path, "--devices", "cpu:0 cpu:1", "-tp", "2", "--worker-timeout", "2") as server:
        client = Client(server)
        running(server, 1)
        os.kill(server.workers()[1].pid, signal.SIGSTOP)
        client.join(20)
        assert not client.is_alive() and isinstance(client.error, openai.InternalServerError)
        assert "cpu:1" in str(client.error)
    assert leftovers(server) == []


def test_killed_server_takes_its_workers_along(tiny: Path, tmp_path: Path) -> None:
    """SIGKILL leaves no time to clean up; the kernel ends the workers and frees their memory."""
    with Server(tiny, tmp_path, "--devices", "cpu:0 cpu:1", "-pp", "2") as server:
        workers = server.workers()
        server.process.kill()
        server.process.wait()
        _, alive = psutil.wait_procs(workers, timeout=10)
        assert not alive
    assert not [str(p) for p in Path("/dev/shm").glob("*evener*")]


def test_sigterm_ends_everything(tiny: Path, tmp_path: Path) -> None:
    """Exit code 0, no process, no socket left."""
    with Server(tiny, tmp_path, "--devices", "cpu:0 cpu:1", "-tp", "2") as server:
        workers = server.workers()
    assert server.process.returncode == 0, server.log.read_text()
    assert not [w for w in workers if w.is_running()]
    assert leftovers(server) == []
