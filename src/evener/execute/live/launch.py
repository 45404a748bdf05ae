"""Starts, watches and ends the worker processes of one plan."""

import asyncio
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO

import msgspec
import zmq

from evener.errors import StartFailed
from evener.execute.live.wire import WorkerConfig

_POLL_S = 0.05


class WorkerProcess:
    """One child process and the end of its standard error."""

    def __init__(self, config: WorkerConfig) -> None:
        self.config = config
        self.name = config.device.name
        self._stderr: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the process
        env = dict(os.environ)
        threads = str(max(1, len(config.device.cores)))
        env |= {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}
        # Short spins: a library's thread that spins on for milliseconds starves whoever needs the core next.
        env.setdefault("GOMP_SPINCOUNT", "3000")
        fds = [config.segment_fd] if config.segment_fd >= 0 else []
        self.process = subprocess.Popen(
            [sys.executable, "-m", "evener.execute.live.worker"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=self._stderr, pass_fds=fds, env=env,
        )  # fmt: skip
        assert self.process.stdin is not None
        # It may have died at once, which `wait` tells; closing tries to write what is left over.
        with suppress(BrokenPipeError):
            self.process.stdin.write(msgspec.msgpack.encode(config))
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    async def wait(self) -> str:
        """Wait for the process to end and say how it did, without polling where the kernel can tell (pidfd)."""
        loop = asyncio.get_running_loop()
        ended: asyncio.Future[None] = loop.create_future()
        try:
            fd = os.pidfd_open(self.process.pid)
        except ProcessLookupError:
            return self.how_it_ended()
        except OSError:  # no descriptor left, a kernel or a sandbox without the call
            while self.process.poll() is None:
                await asyncio.sleep(_POLL_S)
            return self.how_it_ended()

        def readable() -> None:
            if not ended.done():
                ended.set_result(None)

        loop.add_reader(fd, readable)
        try:
            await ended
        finally:
            loop.remove_reader(fd)
            os.close(fd)
        return self.how_it_ended()

    def how_it_ended(self) -> str:
        """`killed by SIGKILL`, or the exit code with the last words on standard error."""
        code = self.process.wait()
        if code < 0:
            try:
                return f"killed by {signal.Signals(-code).name}"
            except ValueError:  # real-time signals have no names
                return f"killed by signal {-code}"
        words = self.last_words()
        return f"exited with code {code}" + (f": {words}" if words else "")

    def last_words(self) -> str:
        """The last line that the worker wrote on standard error."""
        self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, self._stderr.tell() - 4096))
        lines = [line for line in self._stderr.read().decode(errors="replace").splitlines() if line.strip()]
        return lines[-1] if lines else ""

    def kill(self) -> None:
        """End it now. Idempotent."""
        if self.process.poll() is None:
            self.process.kill()

    def close(self) -> None:
        """Reap it and forget its output."""
        self.process.wait()
        self._stderr.close()


class SocketDir:
    """A directory only this user can enter, for ZeroMQ's ipc sockets."""

    def __init__(self) -> None:
        """Raises StartFailed when the directory for temporary files cannot hold it."""
        try:
            self._dir = tempfile.TemporaryDirectory(prefix="evener-")  # mode 0700
        except OSError as error:
            where = error.filename or tempfile.gettempdir()
            raise StartFailed(f"cannot make a directory in {where}: {error.strerror}; set TMPDIR to another") from error
        path = Path(self._dir.name) / "control"
        self.endpoint = f"ipc://{path}"
        if (length := len(os.fsencode(path))) > zmq.IPC_PATH_MAX_LEN:
            self.close()
            raise StartFailed(
                f"the socket path {path} has {length} bytes, the system allows {zmq.IPC_PATH_MAX_LEN}; set TMPDIR to a "
                "shorter directory"
            )

    def close(self) -> None:
        """Remove it. Idempotent."""
        self._dir.cleanup()
