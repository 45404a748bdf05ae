"""WHO DOES IT: what the front and the offline API may ask of a running engine, live or fake."""

from collections.abc import AsyncIterator
from typing import Protocol

from msgspec import Struct

from evener.engine.events import Answer
from evener.engine.request import Request
from evener.execute.served import ServedLog
from evener.ledger.ledger import Ledger
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan


class ReplicaStatus(Struct, frozen=True):
    """One replica at one instant."""

    replica: int
    devices: tuple[str, ...]
    alive: bool
    reason: str = ""
    """Why it is down, when it is."""
    running: int = 0
    """Sequences that hold KV blocks."""
    waiting: int = 0
    in_flight: int = 0
    """Batches issued and not yet done."""
    kv_blocks: int = 0
    kv_blocks_free: int = 0
    """Free or cached-and-evictable."""
    preemptions: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0


class Status(Struct, frozen=True):
    """What /health and /metrics show."""

    ready: bool
    replicas: tuple[ReplicaStatus, ...]
    reason: str = ""
    """Why it is not ready, and how to go on."""
    warnings: tuple[str, ...] = ()
    """What went wrong beside serving: a recording or a ledger that stopped."""


class Engine(Protocol):
    """A running engine. All methods are called from one asyncio event loop."""

    model: ModelSpec
    plan: Plan
    max_model_len: int
    """Prompt plus output tokens of one sequence, at most."""
    max_top_logprobs: int

    def submit(self, request: Request) -> AsyncIterator[Answer]:
        """Queue a request and iterate over its answers; the last one has `finish` set.

        Raises Overloaded (429), WorkerLost or Unavailable (503), ContextTooLong (400), from the first
        `__anext__` on. Closing the iterator early cancels the request and frees its KV.
        """
        ...

    def cancel(self, request_id: str, stopped: bool = False) -> None:
        """End a request now. `stopped`: a stop string appeared. The iterator then ends with an Answer whose
        `finish` is `cancelled` or `stop`. Unknown or finished ids are ignored."""
        ...

    def status(self) -> Status:
        """Health and counters, cheap enough for every scrape."""
        ...

    def ledger(self) -> Ledger:
        """Where every device-second went, up to now. Raises Unavailable when none is kept."""
        ...

    def served(self) -> ServedLog:
        """What runs, and the lengths and times of the newest requests; kept with or without a ledger."""
        ...

    async def close(self) -> None:
        """Stop the workers and free everything; idempotent."""
        ...
