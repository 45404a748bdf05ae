"""Law 2 on real workers, with a tiny model; `benchmarks/ledger_live.py` does it with the real one, for longer."""

import time
from pathlib import Path
from typing import Any

import pytest

from evener import LLM, SamplingParams
from evener.errors import Unavailable
from evener.execute.live.record import Timing, read_record
from evener.ledger.causes import Cause
from evener.ledger.spans import Op

pytestmark = pytest.mark.slow
FOUR = ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1")


def run(llm: LLM, requests: int = 12) -> None:
    prompts = [[7 + k] * (20 + 9 * k) for k in range(requests)]
    llm.generate(prompts, SamplingParams(temperature=0.7, max_tokens=40, ignore_eos=True, seed=1))


@pytest.mark.parametrize(
    "options",
    [
        {"devices": FOUR[:2], "tensor_parallel_size": 2},
        {"devices": FOUR[:2], "pipeline_parallel_size": 2},
        {"devices": FOUR, "tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"devices": ("cpu:0", "cpu:1,slowdown=3"), "data_parallel_size": 2},
        {"devices": ("cpu:0-1",)},
    ],
    ids=["tp2", "pp2", "tp2xpp2", "dp2-slow", "threads"],
)
def test_law_2_ledger_closes_live(tiny: Path, options: dict[str, Any]) -> None:
    """Every nanosecond of every device has one cause, and hardly any is unattributed, cores shared or not."""
    with LLM(str(tiny), **options) as llm:
        run(llm)
        time.sleep(0.5)  # the workers are idle and have reported
        account = llm.engine.ledger().account()
        asked = {name: llm.engine.cluster.device(name) for name in account.devices}
    assert set(account.devices) == {d.split(",")[0] for d in options["devices"]}
    for name, device in account.devices.items():
        assert device.spans > 30 and device.compute_s > 0
        assert sum(device.causes_ns) == device.wall_ns
        assert abs(device.wall_s - account.window_s) < 1e-9
        assert device.share(Cause.DOWN) > 0, "loading counts"
        assert device.share(Cause.UNATTRIBUTED) < 0.01, (name, device.causes)
        if len(asked[name].cores) == 1:
            assert device.cpu_s == pytest.approx(device.compute_s / asked[name].slowdown, rel=0.15)


def test_segments_tile_their_spans(tiny: Path, tmp_path: Path) -> None:
    record = tmp_path / "run"
    options = {"tensor_parallel_size": 2, "trace_segments": True, "record": str(record)}
    with LLM(str(tiny), devices=FOUR[:2], **options) as llm:
        run(llm, 2)
    spans = [s for kept in read_record(record) if isinstance(kept, Timing) for s in kept.spans]
    assert len(spans) > 30
    for span in spans:
        at = span.began
        for segment in span.segments:
            assert segment.entered == at <= segment.arrived <= segment.ended
            at = segment.ended
        assert at == span.ended
        reduced = [s for s in span.segments if s.op == Op.ALL_REDUCE]
        assert len(reduced) == 9, "two in each of four layers, and the embedding"


def test_without_a_ledger(tiny: Path) -> None:
    with LLM(str(tiny), devices=("cpu:0",), ledger=False) as llm:
        run(llm, 1)
        assert llm.engine.chronicle.reported == {}
        with pytest.raises(Unavailable, match="--no-ledger"):
            llm.engine.ledger()
