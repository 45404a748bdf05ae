"""A fake engine that has served simulated requests: its ledger and its log are those of the simulator."""

from collections.abc import Sequence

from fake import FakeEngine, header_of

from evener.brain import Brain
from evener.engine.events import Command, Event
from evener.engine.request import Request
from evener.execute.served import ServedLog
from evener.execute.sim.body import Simulator
from evener.execute.sim.traffic import SimRequest
from evener.ledger.ledger import Ledger
from evener.units import Nanoseconds
from evener.workload.replay import recorded_costs

MS = 1_000_000
LENGTHS = ((20, 8), (60, 12), (33, 5), (16, 9), (80, 16), (9, 1))


class _TellingBrain(Brain):
    """Tells the log of every step, as the live engine does."""

    log: ServedLog

    def step(self, event: Event, now: Nanoseconds) -> list[Command]:
        commands = super().step(event, now)
        self.log.step(now, event, commands)
        return commands


def asked(k: int, at_ms: float, prompt: int, output: int, leaves_ms: float | None = None) -> SimRequest:
    """A request with contents, so that a test sees whether they get out."""
    request = Request(f"cmpl-secret-{k}", prompt, 32, prompt=[300 + (k + i) % 90 for i in range(prompt)])
    left = None if leaves_ms is None else Nanoseconds(round(leaves_ms * MS))
    return SimRequest(request, Nanoseconds(round(at_ms * MS)), output, left)


def busy_engine(traffic: Sequence[SimRequest] = (), keep: int = 8) -> FakeEngine:
    """Serves `traffic` (else six requests, 1 s after the start), in the time that its cost model says, to its end."""
    made = FakeEngine()
    header = header_of(made)
    costs = recorded_costs(header)
    made.log, made.kept = ServedLog(header, keep), Ledger(made.plan, costs, start=header.started)
    brain = _TellingBrain(made.plan, header.kv_blocks, costs, header.brain, journal=made.kept)
    brain.log = made.log
    todo = traffic or [asked(k, 1000 + 2 * k, *lengths) for k, lengths in enumerate(LENGTHS)]
    Simulator(brain, costs, todo, ledger=made.kept, fast=False).run()
    return made
