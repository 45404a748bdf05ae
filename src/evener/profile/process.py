"""A probe process seen from its parent: start it, ask it, stop it. Every wait ends in an answer or in WorkerLost."""

import os
import select
import subprocess
import sys
import tempfile
import time

import msgspec

from evener.errors import WorkerLost
from evener.profile.items import Answer, Ask, Item, Setup
from evener.units import Seconds

START_S, ANSWER_S = Seconds(120.0), Seconds(60.0)
"""How long a probe may take to load torch, and to answer."""


class ProbeProcess:
    """`python -m evener.profile.probe` for one device."""

    def __init__(self, device: str, setup: Setup) -> None:
        self.device = device
        threads = str(max(1, len(setup.cores)))
        env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "evener.profile.probe"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, bufsize=0, env=env,
            pass_fds=() if setup.segment_fd is None else (setup.segment_fd,),
        )  # fmt: skip
        self._buffer = b""
        self._send(setup)

    def wait_ready(self) -> None:
        """Until torch is loaded. Raises WorkerLost."""
        self.answer(START_S)

    def ask(self, item: Item, budget_s: float) -> None:
        """Put a question; `answer` fetches the reply."""
        self._send(Ask(item, budget_s))

    def answer(self, timeout_s: float = ANSWER_S) -> Answer:
        """The next reply. Raises WorkerLost, with what the process wrote last, when it dies or takes too long."""
        assert self._process.stdout is not None
        until = time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left = until - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise WorkerLost(self.device, f"no answer to a measurement within {timeout_s:g} s{self._said()}")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                code = self._process.wait()
                raise WorkerLost(self.device, f"the measuring process ended with status {code}{self._said()}")
            self._buffer += piece
        line, _, self._buffer = self._buffer.partition(b"\n")
        return msgspec.json.decode(line, type=Answer)

    def close(self) -> None:
        """End the process; idempotent."""
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()
        try:
            self._process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def _send(self, message: Setup | Ask) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(msgspec.json.encode(message) + b"\n")
        except BrokenPipeError:
            raise WorkerLost(self.device, f"the measuring process ended early{self._said()}") from None

    def _said(self) -> str:
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""
