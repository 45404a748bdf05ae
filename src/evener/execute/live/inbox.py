"""The worker's end of the control socket: takes commands, and sends spans when that delays nothing."""

import time

import zmq

from evener.execute.live.spans import SpanMaker
from evener.execute.live.transport.pace import Pace
from evener.execute.live.wire import Spans, ToWorker, decode_to_worker, encode
from evener.units import Nanoseconds

_PERIOD_NS = 100_000_000
"""Between two bundles of a busy worker."""
_PAUSE_NS = 200_000
"""From the end of a batch to the next command, where that is already there, it takes less."""
_IDLE_MS = 10
"""A worker that has had no command for so long has nothing better to do than to send its bundle."""


class Inbox:
    """Receives commands in order. With a span maker it also tells it about idle time and sends what it made."""

    def __init__(self, socket: "zmq.Socket[bytes]", device: str, pace: Pace, spans: SpanMaker | None) -> None:
        self._socket = socket
        self._device = device
        self._pace = pace
        self._spans = spans
        self._sent = time.monotonic_ns()
        self._idle = True
        """No span follows on another here: the next one begins when its command is here."""

    def next(self) -> ToWorker:
        """Wait for the next command."""
        if self._spans is None:
            data = self._socket.recv()
            # A slow device pays nothing by waiting for work; with a span maker that is told by `woken`.
            self._pace.idled(time.monotonic_ns(), time.thread_time_ns())
            return self._decoded(data)
        if time.monotonic_ns() - self._sent >= _PERIOD_NS:
            self.send_spans()
        try:
            data = self._socket.recv(zmq.NOBLOCK)
            # Off the core since the last batch ended? Then the command may have come any time meanwhile.
            self._idle |= time.monotonic_ns() - self._spans.began > _PAUSE_NS
        except zmq.Again:
            if not self._socket.poll(_IDLE_MS):
                self.send_spans()
            data = self._socket.recv()
            self._idle = True
        if self._idle:
            self._spans.woken()
            self._idle = False
        return self._decoded(data)

    @staticmethod
    def _decoded(data: bytes) -> ToWorker:
        message: ToWorker = decode_to_worker(data)
        return message

    def send_spans(self) -> None:
        """Send what has gathered since the last bundle."""
        assert self._spans is not None
        self._sent = time.monotonic_ns()
        if made := self._spans.take():
            wait, idle = Nanoseconds(self._spans.wait_cpu), Nanoseconds(self._spans.idle_cpu)
            self._socket.send(encode(Spans(self._device, made, wait, idle)))
