"""What a live run writes down: the recording, for replay, the ledger, and the lengths of the newest requests. None of
them may break serving."""

import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evener.brain import BrainConfig
from evener.cost.base import CostModel
from evener.engine.events import Command, Event
from evener.errors import Unavailable
from evener.execute.live.feed import LedgerFeed
from evener.execute.live.fleet import LiveConfig
from evener.execute.live.record import FORMAT, Entry, Kept, Recorder, ReplicaUp, Timing
from evener.execute.live.wire import Spans
from evener.execute.served import Header, ServedLog
from evener.ledger.ledger import Ledger
from evener.ledger.work import Work
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import Nanoseconds

KEEP_SPANS = 4000
"""Newest spans of each device that a trace shows; about 3 MiB."""
KEEP_TRACED = 1000
"""The same where each has a hundred segments or more."""
KEEP_REQUESTS = 4096
"""Newest requests whose lengths and times are known; about 2 MiB."""


class Chronicle:
    """Writes every step and every span of one run to the recording and the ledger, as far as they are wanted."""

    def __init__(self, config: LiveConfig, plan: Plan, costs: CostModel, work: Work | None) -> None:
        """Loading counts from now on. Raises InvalidInput when the recording cannot be opened."""
        self.started = Nanoseconds(time.monotonic_ns())
        self.reported: dict[str, Spans] = {}
        """Device -> its last bundle."""
        self._config = config
        self._plan = plan
        self._ready: set[str] = set()
        self._failure = ""
        """Why the recording stopped, if it did."""
        self._recorder = Recorder(Path(config.record)) if config.record else None
        self.served: ServedLog | None = None
        """Since `begin`."""
        self.feed: LedgerFeed | None = None
        if config.ledger:
            keep = KEEP_TRACED if config.trace_segments else KEEP_SPANS
            self.feed = LedgerFeed(Ledger(plan, costs, start=self.started, work=work, keep_spans=keep))

    def begin(
        self, model: ModelSpec, cluster: Cluster, kv_blocks: list[int], brain: BrainConfig, costs: dict[str, Any]
    ) -> None:
        """Say what runs."""
        header = Header(
            format=FORMAT,
            evener=version("evener"),
            started=self.started,
            model=model,
            model_name=self._config.model_path,
            plan=self._plan,
            cluster=cluster,
            kv_blocks=kv_blocks,
            brain=brain,
            costs=costs,
        )
        self.served = ServedLog(header, KEEP_REQUESTS)
        self._keep(header)

    def step(self, now: Nanoseconds, event: Event, commands: list[Command]) -> None:
        """The brain consumed an event. The ledger hears of it from the brain itself."""
        if self.served is not None:
            self.served.step(now, event, commands)
        if self._recorder is not None:
            self._keep(Entry(now, event, commands))

    def ready(self, device: str) -> None:
        """A worker has loaded; with the last one of its replica loading is over there."""
        self._ready.add(device)
        now = Nanoseconds(time.monotonic_ns())
        for r, replica in enumerate(self._plan.replicas):
            if device in replica.devices() and self._ready.issuperset(replica.devices()):
                self._keep(ReplicaUp(now, r))
                if self.feed is not None:
                    self.feed.up(r, now)

    def spans(self, bundle: Spans) -> None:
        """A worker reported."""
        self.reported[bundle.device] = bundle
        self._keep(Timing(Nanoseconds(time.monotonic_ns()), bundle.device, bundle.spans))
        if self.feed is not None:
            for span in bundle.spans:
                self.feed.span(span)

    def ledger(self) -> Ledger:
        """Settled up to now. Raises Unavailable when none is kept, or it failed."""
        if self.feed is None:
            raise Unavailable("this server keeps no ledger; start it without --no-ledger")
        return self.feed.read(Nanoseconds(time.monotonic_ns()))

    def warnings(self) -> tuple[str, ...]:
        """What is not written down any more, and why."""
        ledger = self.feed.failure if self.feed is not None else ""
        return tuple(text for text in (self._failure, ledger and f"the ledger stopped: {ledger}") if text)

    def close(self) -> None:
        """Finish the recording; idempotent."""
        if self._recorder is not None:
            try:
                self._recorder.close()
            except OSError as error:
                self._failed(error)

    def _keep(self, kept: Kept) -> None:
        if self._recorder is None or self._recorder.closed or self._failure:
            return
        try:
            self._recorder.add(kept)
        except OSError as error:
            self._failed(error)

    def _failed(self, error: OSError) -> None:
        if not self._failure:
            self._failure = (
                f"the recording {self._config.record} stopped: {error.strerror}; what was written before can be read"
            )
            print(f"evener: {self._failure}", file=sys.stderr, flush=True)
