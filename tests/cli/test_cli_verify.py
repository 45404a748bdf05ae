"""`evener verify`: what it makes of its options, what it demands of a run, what it says."""

import json
from typing import Any

import msgspec
import pytest
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.laws.traffic import SimpleCosts
from typer.testing import CliRunner, Result

from evener.brain import Brain, BrainConfig
from evener.cli.verify import verify as command
from evener.engine.events import Command, Event, IssueBatch
from evener.engine.request import Request
from evener.execute.sim.body import SimRequest, Simulator
from evener.spec.memory import BLOCK_TOKENS
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds
from evener.verify import Verdict, claims, make_prompts, size_kv

app = typer.Typer()
app.command()(command)
GOOD = Verdict(
    plan="tp2", passed=True, equal=True, not_seen=(), dtype="fp32", kv_dtype="fp32", kl=0.0, kl_bound=1e-6,
    max_rel_err=1e-6, beyond=0.0, greedy_equal=3, diverged_at_ties=0,
    diverged_wrongly=0, sequences=3, positions=9, tolerance=1e-3, chunked_prompts=1, mixed_batches=1,
    prefix_hit_tokens=16, preemptions=1, seconds=1.0,
)  # fmt: skip


def run(monkeypatch: pytest.MonkeyPatch, verdict: Verdict, *args: str) -> tuple[Result, dict[str, Any]]:
    got: dict[str, Any] = {}

    def fake(options: dict[str, Any], **rest: int) -> Verdict:
        got.update(options=options, **rest)
        return verdict

    monkeypatch.setattr("evener.verify.verify", fake)
    return CliRunner().invoke(app, args), got


def test_an_option_said_with_its_default_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    _, got = run(monkeypatch, GOOD, "--max-num-seqs", "64", "-tp", "1", "--policy", "equal-time", "--tokens", "5")
    assert got["options"] == {"max_num_seqs": 64, "tensor_parallel_size": 1, "policy": "equal-time"}
    assert got["tokens"] == 5
    assert run(monkeypatch, GOOD)[1]["options"] == {}


def test_the_verdict_names_what_the_run_does_not_cover(monkeypatch: pytest.MonkeyPatch) -> None:
    result, _ = run(monkeypatch, GOOD)
    assert result.exit_code == 0 and "equal to the reference" in result.stderr and "not covered" not in result.stderr
    short = msgspec.structs.replace(GOOD, passed=False, not_seen=("mixed_batches", "preemptions"), preemptions=0)
    result, _ = run(monkeypatch, short)
    assert result.exit_code == 1
    assert "not covered by this run: mixed batches, preemptions; raise --requests" in result.stderr
    result, _ = run(monkeypatch, short, "--json")
    assert json.loads(result.stdout)["not_seen"] == ["mixed_batches", "preemptions"]
    assert not result.stderr


def test_only_what_a_policy_does_is_claimed() -> None:
    assert claims("static", 24) == ()
    assert set(claims("equal-time", 1)) == {"chunked_prompts", "prefix_hit_tokens"}
    assert set(claims("fcfs", 2)) <= set(Verdict.__struct_fields__) and len(claims("fcfs", 2)) == 4


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 4), st.integers(1, 3), st.sampled_from(["equal-time", "fcfs"]), st.integers(16, 64),
    st.sampled_from([4, 8, 24, 64]), st.integers(0, 1000),
)  # fmt: skip
def test_every_plan_sees_chunks_mixed_batches_and_preemption(
    stages: int, replicas: int, policy: str, tokens: int, max_num_seqs: int, seed: int
) -> None:
    """The real brain in virtual time: as deep and wide as plans get, the KV that verification gives is too small."""
    requests, longest = 64, 160
    prompts = make_prompts(1000, requests, longest, seed)
    rows = min(max_num_seqs, -(-requests // replicas))
    few = size_kv([len(p) for p in prompts], tokens, rows, 64, longest + tokens)
    assert few * BLOCK_TOKENS >= longest + tokens
    shard = (Shard("cpu:0", (0, 1), (0, 16), (0, 1000), (0, 1000)),)
    plan = Plan(tuple(Replica(tuple(Stage((s, s + 1), shard) for s in range(stages))) for _ in range(replicas)))
    costs = SimpleCosts(stages)
    config = BrainConfig(
        policy=policy, router="round-robin", max_num_seqs=max_num_seqs, max_num_batched_tokens=64, max_queue=1 << 30
    )
    brain = Brain(plan, [few] * replicas, costs, config)
    batches, step = [], brain.step

    def watched(event: Event, now: Nanoseconds) -> list[Command]:
        commands = step(event, now)
        batches.extend(c.batch for c in commands if isinstance(c, IssueBatch))
        return commands

    brain.step = watched  # type: ignore[method-assign]
    asked = [Request(f"r{k}", len(p), tokens, prompt=p) for k, p in enumerate(prompts)]
    Simulator(brain, costs, [SimRequest(r, Nanoseconds(0), tokens + 1) for r in asked]).run()
    assert any(not c.sample for b in batches for c in b.chunks)
    assert any(b.chunks and b.step for b in batches)
    assert sum(r.preemptions for r in brain.replicas) > 0
