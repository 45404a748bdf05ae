"""Starts `evener serve` as a person would, and finds what it leaves behind."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path
from types import TracebackType
from typing import Any

import psutil


class Server:
    """`evener serve` on a free port, in a temporary directory of its own."""

    def __init__(self, model: Path | None, tmp: Path, *options: str) -> None:
        self.log = tmp / "serve.log"
        self.tmp = tmp / "sockets"
        self.tmp.mkdir(exist_ok=True)
        command = [sys.executable, "-m", "evener.cli", "serve", "--port", "0", *options]
        if model is not None:
            command.append(str(model))
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(command, stderr=log, env=os.environ | {"TMPDIR": str(self.tmp)})
        self.url = ""

    def __enter__(self) -> "Server":
        deadline = time.monotonic() + 90
        while not self.url:
            for line in self.log.read_text().splitlines():
                if "ready on http" in line:
                    self.url = line.split("ready on ")[1].removesuffix("/v1")
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < deadline, self.log.read_text()
            time.sleep(0.05)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def workers(self) -> list[psutil.Process]:
        """The worker processes, in the order of their start."""
        children = psutil.Process(self.process.pid).children()
        return sorted((c for c in children if "evener.execute.live.worker" in c.cmdline()), key=lambda c: c.pid)

    def get(self, path: str) -> tuple[int, Any]:
        """Status and parsed JSON (or text)."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=30) as reply:
                status, data = reply.status, reply.read()
        except urllib.error.HTTPError as error:
            status, data = error.code, error.read()
        try:
            return status, json.loads(data)
        except ValueError:
            return status, data.decode()

    def metric(self, name: str) -> float:
        """Sum of a metric over its labels."""
        _, text = self.get("/metrics")
        lines = [x for x in text.splitlines() if x.startswith(name) and x[len(name)] in "{ "]
        assert lines, f"no metric {name}"
        return sum(float(x.rsplit(" ", 1)[1]) for x in lines)
