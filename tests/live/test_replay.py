"""Law 4 on a live run: the recorded events, replayed, give the same commands and the same ledger."""

from pathlib import Path

import msgspec
import pytest

from evener import LLM, SamplingParams
from evener.brain import Brain
from evener.engine.events import BatchDone, IssueBatch
from evener.execute.live.record import Entry, ReplicaUp, Timing, read_record
from evener.execute.served import Header
from evener.ledger.ledger import Ledger

pytestmark = pytest.mark.slow


def test_law_4_a_recorded_live_run_replays(tiny: Path, tmp_path: Path) -> None:
    """Two pipelined replicas under preemption; every command is the same, byte for byte, and so is the account."""
    record = tmp_path / "run.evener"
    options = {
        "devices": ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1"),
        "pipeline_parallel_size": 2,
        "data_parallel_size": 2,
        "max_num_seqs": 6,
        "kv_cache_memory": f"{30 * 16 * 2 * 2 * 3 * 16 * 4}B",
        "record": str(record),
    }
    with LLM(str(tiny), **options) as llm:
        prompts = [[7 + k] * (20 + 9 * k) for k in range(16)]
        llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True, seed=1))
        engine = llm.engine
    header, *rest = read_record(record)
    assert isinstance(header, Header) and header.costs["profile"]
    ledger = Ledger(header.plan, engine.brain.costs, start=header.started)
    fresh = Brain(header.plan, header.kv_blocks, engine.brain.costs, header.brain, ledger)
    for kept in rest:
        if isinstance(kept, Entry):
            again = fresh.step(kept.event, kept.now)
            assert msgspec.msgpack.encode(again) == msgspec.msgpack.encode(kept.commands)
        elif isinstance(kept, Timing):
            for span in kept.spans:
                ledger.span(span)
        else:
            assert isinstance(kept, ReplicaUp)
            ledger.up(kept.replica, kept.now)
    entries = [e for e in rest if isinstance(e, Entry)]
    assert sum(isinstance(e.event, BatchDone) for e in entries) > 40
    assert sum(isinstance(c, IssueBatch) for e in entries for c in e.commands) > 40
    live, replayed = engine.ledger().account(), ledger.account()
    for name, device in replayed.devices.items():
        assert device.spans and device.spans == live.devices[name].spans
        assert device.compute_s == live.devices[name].compute_s
