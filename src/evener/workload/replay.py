"""A recorded live run again: the same decisions from the same events (law 4), and its ledger from its own spans."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from evener.brain import Brain
from evener.cost.base import CostModel
from evener.cost.rates import Profile, bind
from evener.cost.roofline import RooflineCostModel
from evener.cost.work import PlanWork
from evener.engine.events import Command, IssueBatch
from evener.errors import InvalidInput
from evener.execute.live.record import Entry, Kept, Timing, read_record
from evener.execute.served import Header
from evener.ledger.ledger import EVERYTHING, Ledger
from evener.units import NS_PER_S

_encode = msgspec.msgpack.Encoder().encode


class Difference(Struct, frozen=True):
    """Where a replay first decides otherwise than the recorded run did."""

    step: int
    """Of the brain, from 0."""
    at_s: float
    """After the run's start."""
    event: str
    recorded: str
    """The first command that differs, as it was; `nothing` where there was none."""
    replayed: str

    @property
    def text(self) -> str:
        """For people."""
        return (
            f"step {self.step}, {self.at_s:.3f} s after the start: upon {self.event}\n"
            f"  recorded: {self.recorded}\n  replayed: {self.replayed}"
        )


class Replayed(Struct, frozen=True):
    """A whole recording, consumed."""

    header: Header
    steps: int
    batches: int
    spans: int
    difference: Difference | None
    """None: every command was the same, byte for byte."""
    ledger: Ledger | None
    """Rebuilt from the recorded spans; None when a decision differed, or no span was recorded."""


def open_recording(path: Path) -> tuple[Header, Iterator[Kept]]:
    """What ran, and the records after. Raises InvalidInput as `read_record` does."""
    kept = read_record(path)
    header = next(kept)
    assert isinstance(header, Header)  # read_record checks the first record
    return header, kept


def recorded_costs(header: Header) -> CostModel:
    """The cost model that the run was decided with. Raises InvalidInput for a kind that this version does not know."""
    made_of: dict[str, Any] = header.costs
    if made_of.get("kind") != "roofline":
        raise InvalidInput(
            f"the recording's cost model is {made_of.get('kind')!r}, this Evener replays 'roofline'; record again"
        )
    return RooflineCostModel(
        header.model, header.plan, bind(recorded_profile(header), header.cluster.devices), made_of["version"],
        dtype=made_of["dtype"], kv_dtype=header.kv_dtype, links=header.cluster.links,
    )  # fmt: skip


def recorded_profile(header: Header) -> Profile:
    """The rates of the devices as the run knew them."""
    return msgspec.convert(header.costs["profile"], Profile)


def recorded_work(header: Header) -> PlanWork:
    """Operations and bytes of batches, to set the ledger's compute beside the peak."""
    profile = bind(recorded_profile(header), header.cluster.devices)
    return PlanWork(header.model, header.plan, profile, header.costs["dtype"], header.kv_dtype)


def replay(path: Path) -> Replayed:
    """Feed a fresh brain with the recorded events, and a fresh ledger with the recorded spans, in the order they came.

    Stops at the first decision that differs. Raises InvalidInput for a file that is no recording of this format.
    """
    header, kept = open_recording(path)
    costs = recorded_costs(header)
    ledger = Ledger(header.plan, costs, start=header.started, work=recorded_work(header), keep=EVERYTHING)
    brain = Brain(header.plan, header.kv_blocks, costs, header.brain, journal=ledger)
    steps = batches = spans = 0
    last = header.started
    for record in kept:
        if isinstance(record, Entry):
            again = brain.step(record.event, record.now)
            if _encode(again) != _encode(record.commands):
                found = _difference(header, steps, record, again)
                return Replayed(header, steps, batches, spans, found, None)
            steps += 1
            batches += sum(isinstance(c, IssueBatch) for c in again)
            last = record.now
        elif isinstance(record, Timing):
            for span in record.spans:
                ledger.span(span)
            spans += len(record.spans)
        elif not isinstance(record, Header):
            ledger.up(record.replica, record.now)
            last = record.now
    if spans:
        ledger.settle(last)
    return Replayed(header, steps, batches, spans, None, ledger if spans else None)


def _difference(header: Header, step: int, entry: Entry, again: list[Command]) -> Difference:
    pairs = range(max(len(again), len(entry.commands)))
    at = next(k for k in pairs if _encode(entry.commands[k : k + 1]) != _encode(again[k : k + 1]))
    seconds = (entry.now - header.started) / NS_PER_S
    return Difference(step, seconds, _shown([entry.event]), _shown(entry.commands[at:]), _shown(again[at:]))


def _shown(things: Any, most: int = 300) -> str:
    if not things:
        return "nothing"
    text = repr(things[0])
    return text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)"
