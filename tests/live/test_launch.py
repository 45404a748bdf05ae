"""Worker processes that end in unusual ways, and sockets that cannot be."""

import asyncio
import errno
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from evener.errors import StartFailed
from evener.execute.live.launch import SocketDir, WorkerProcess
from evener.execute.live.wire import WorkerConfig
from evener.spec.cluster import parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import Replica, Shard, Stage

DEVICE = parse_device("cpu:0")
REPLICA = Replica((Stage((0, 1), (Shard("cpu:0", (0, 1), (0, 16), (0, 40), (0, 40)),)),))
CONFIG = WorkerConfig(
    model="x" * 500_000,  # longer than a pipe holds
    spec=ModelSpec("llama", 40, 8, 1, 1, 1, 8, 16, 64), replica=REPLICA, replica_index=0, stage=0, rank=0,
    device=DEVICE, devices=(DEVICE,), links=(), epoch=0, dtype="fp32", kv_dtype="fp32", kv_blocks=1,
    block_tokens=16, max_num_seqs=1,
    max_model_len=16, max_batch_tokens=16, control_pid=os.getpid(), endpoint="ipc:///nowhere", segment_fd=-1,
    shares_core=False, wait_deadline_s=1.0,
)  # fmt: skip


@pytest.fixture
def starts(monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """`starts(code)`: a worker process that runs this instead."""
    popen = subprocess.Popen

    def start(code: str) -> WorkerProcess:
        def instead(command: list[str], **options: object) -> "subprocess.Popen[bytes]":
            return popen([sys.executable, "-S", "-c", code], **options)  # type: ignore[call-overload,no-any-return]

        monkeypatch.setattr(subprocess, "Popen", instead)
        return WorkerProcess(CONFIG)

    return start


def test_a_worker_that_dies_before_it_reads(starts) -> None:  # type: ignore[no-untyped-def]
    worker = starts("import sys; print('no room', file=sys.stderr); sys.exit(7)")
    assert asyncio.run(worker.wait()) == "exited with code 7: no room"
    worker.close()


READS = "import sys, os, signal; sys.stdin.buffer.read(); "


@pytest.mark.parametrize(
    ("number", "name"),
    [(signal.SIGKILL, "SIGKILL"), (signal.SIGRTMIN + 3, f"signal {signal.SIGRTMIN + 3}")],
    ids=["named", "real-time"],
)
def test_any_signal_has_a_name(starts, number: int, name: str) -> None:  # type: ignore[no-untyped-def]
    worker = starts(READS + f"os.kill(os.getpid(), {int(number)})")
    assert asyncio.run(worker.wait()) == f"killed by {name}"
    worker.close()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENOSYS])
def test_without_a_pidfd_it_is_still_watched(starts, monkeypatch: pytest.MonkeyPatch, number: int) -> None:  # type: ignore[no-untyped-def]
    def refused(pid: int) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "pidfd_open", refused)
    worker = starts(READS + "sys.exit(3)")
    assert asyncio.run(worker.wait()) == "exited with code 3"
    worker.close()


def test_a_path_too_long_for_a_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    deep = tmp_path / ("d" * 120)
    deep.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(deep))
    with pytest.raises(StartFailed, match="TMPDIR"):
        SocketDir()
    assert list(deep.iterdir()) == [], "nothing is left behind"


def test_a_directory_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
    with pytest.raises(StartFailed, match="missing"):
        SocketDir()
