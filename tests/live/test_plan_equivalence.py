"""Law 6 on real worker processes, with a tiny model; `benchmarks/verify_plans.py` does it with the real one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evener.model.source import open_model
from evener.verify import Reference, verify

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

LOPSIDED = """
name: lopsided
replicas:
  - stages:
      - layers: [0, 1]
        shards:
          - {device: "cpu:0", heads: [0, 7], ffn: [0, 16], embed_rows: [0, 49152]}
          - {device: "cpu:1", heads: [7, 9], ffn: [16, 160], embed_rows: [49152, 49152]}
      - layers: [1, 4]
        shards:
          - {device: "cpu:0#1", heads: [0, 0], ffn: [0, 96], head_rows: [0, 1000]}
          - {device: "cpu:1#1", heads: [0, 9], ffn: [96, 160], head_rows: [1000, 49152]}
  - stages:
      - layers: [0, 4]
        shards: ["cpu:0#2"]
"""
FOUR = ("cpu:0", "cpu:1", "cpu:0#1", "cpu:1#1")


@pytest.fixture(scope="module")
def reference(tiny: Path) -> Iterator[Reference]:
    yield Reference(open_model(tiny))


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 4},
        {"pipeline_parallel_size": 3},
        {"tensor_parallel_size": 2, "pipeline_parallel_size": 2},
        {"data_parallel_size": 2, "tensor_parallel_size": 2, "policy": "fcfs"},
        {"data_parallel_size": 2, "policy": "static", "static_batch": 4},
        {"plan": LOPSIDED},
    ],
    ids=lambda o: "-".join(f"{k.split('_')[0]}{v}" if k != "plan" else "lopsided" for k, v in o.items()),
)
def test_law_6_plan_equivalence(tiny: Path, tmp_path: Path, reference: Reference, options: dict[str, Any]) -> None:
    """Any valid plan gives the reference's logits within tolerance and its greedy tokens, ties aside."""
    if "plan" in options:
        file = tmp_path / "plan.yaml"
        file.write_text(options["plan"])
        options = {"plan": str(file)}
    else:
        options = {"devices": FOUR, **options}
    verdict = verify({"model": str(tiny), **options}, requests=24, tokens=24, longest=120, reference=reference)
    assert verdict.passed and not verdict.not_seen, verdict
    assert verdict.max_rel_err < 1e-4
    replicas = 2 if options.get("data_parallel_size") == 2 or "plan" in options else 1
    assert verdict.sequences == verdict.greedy_equal + verdict.diverged_at_ties == 30 + 2 * replicas
    if options.get("policy") != "static":
        assert verdict.chunked_prompts and verdict.mixed_batches and verdict.prefix_hit_tokens, verdict
        assert verdict.preemptions, verdict
