"""Recordings made by the simulator: as a live run would have written them, in milliseconds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec

from evener.brain import Brain, BrainConfig
from evener.cost.base import CostModel
from evener.cost.rates import bind, default_profile
from evener.cost.roofline import RooflineCostModel
from evener.cost.work import PlanWork
from evener.engine.events import Command, Event
from evener.execute.live.record import FORMAT, Entry, Recorder, ReplicaUp, Timing
from evener.execute.served import Header
from evener.execute.sim.body import Simulator
from evener.execute.sim.traffic import Failure, Outcome, SimRequest
from evener.ledger.ledger import Ledger
from evener.ledger.spans import Span
from evener.plan.default import default_plan
from evener.spec.cluster import Cluster, parse_device
from evener.spec.model import ModelSpec
from evener.spec.traffic import TrafficMix
from evener.units import Nanoseconds
from evener.workload.replay import recorded_profile

MODEL = ModelSpec(
    family="llama", layers=6, hidden=96, heads=6, kv_heads=3, head_dim=16, ffn=192, vocab=600, max_position=512,
    tied=True,
)  # fmt: skip


class _WritingBrain(Brain):
    """Writes every step down, as the live engine does."""

    recorder: Recorder

    def step(self, event: Event, now: Nanoseconds) -> list[Command]:
        commands = super().step(event, now)
        self.recorder.add(Entry(now, event, commands))
        return commands


class _WritingLedger(Ledger):
    """Writes every span down."""

    recorder: Recorder

    def span(self, span: Span) -> None:
        device = self.plan.replicas[span.replica].stages[span.stage].shards[span.rank].device
        self.recorder.add(Timing(self.now, device, (span,)))
        super().span(span)

    def stage_span(self, span: Span) -> None:
        for rank in range(len(self.plan.replicas[span.replica].stages[span.stage].shards)):
            self.span(msgspec.structs.replace(span, rank=rank))

    def up(self, replica: int, now: Nanoseconds) -> None:
        self.recorder.add(ReplicaUp(now, replica))
        super().up(replica, now)


def header(
    devices: Sequence[str], tp: int, pp: int, dp: int, kv_blocks: int = 64, dtype: str = "fp32",
    kv_dtype: str = "fp32", **brain: Any,
) -> tuple[Header, RooflineCostModel]:  # fmt: skip
    """A plan for a small model, and its cost model."""
    parsed = [parse_device(d) for d in devices]
    profile = bind(default_profile(parsed), parsed)
    plan = default_plan(MODEL, parsed, tp, pp, dp, profile, TrafficMix())
    costs = {
        "kind": "roofline", "version": 0, "dtype": dtype, "kv_dtype": kv_dtype, "profile": msgspec.to_builtins(profile),
    }  # fmt: skip
    config = BrainConfig(**{"max_num_seqs": 8, "max_num_batched_tokens": 64, **brain})
    start = Nanoseconds(0)
    written = Header(
        FORMAT, "test", start, MODEL, "tiny", plan, Cluster(tuple(parsed)), [kv_blocks] * dp, config, costs
    )  # fmt: skip
    return written, RooflineCostModel(MODEL, plan, profile, dtype=dtype, kv_dtype=kv_dtype)


def write_recording(
    path: Path,
    written: Header,
    costs: RooflineCostModel,
    traffic: Sequence[SimRequest],
    *,
    truth: CostModel | None = None,
    failures: Sequence[Failure] = (),
) -> tuple[list[Outcome], Ledger]:
    """Simulate and record. `truth`: what batches really take, where that is not what `costs` say."""
    recorder = Recorder(path)
    recorder.add(written)
    profile = bind(recorded_profile(written), written.cluster.devices)
    work = PlanWork(MODEL, written.plan, profile, written.costs["dtype"], written.costs["kv_dtype"])
    ledger = _WritingLedger(written.plan, costs, start=written.started, work=work)
    brain = _WritingBrain(written.plan, written.kv_blocks, costs, written.brain, journal=ledger)
    ledger.recorder = brain.recorder = recorder
    outcomes = Simulator(brain, truth or costs, traffic, failures, ledger=ledger, fast=False).run()
    recorder.close()
    return outcomes, ledger
