"""`evener simulate` and its library entry: hardware and models that are not at hand."""

import json
from pathlib import Path

import pytest
from msgspec import structs
from typer.testing import CliRunner

from evener.cli.main import app
from evener.errors import EvenerError, InvalidInput
from evener.planning import make_plan
from evener.simulate import Simulated, SimulateOptions, simulate

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 32000, "hidden_size": 4096,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "rms_norm_eps": 1e-5, "tie_word_embeddings": False,
}  # fmt: skip
CLUSTER = """
hosts:
  - name: box
    devices:
      - {device: "cuda:0", profile: a100_sxm_80gb, count: 4}
"""


@pytest.fixture
def base(tmp_path: Path) -> SimulateOptions:
    """An 8B model on four GPUs, none of them here."""
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return SimulateOptions(
        model=str(tmp_path / "config.json"), cluster=str(tmp_path / "cluster.yaml"),
        traffic="rate=20,in=lognormal:500:0.8,out=lognormal:100:0.7,requests=300",
    )  # fmt: skip


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1, 2), (1, 2, 2), (2, 2, 1)])
def test_plans_serve_everything_and_close_their_ledger(base: SimulateOptions, sizes: tuple[int, int, int]) -> None:
    """Every request completes, and every nanosecond of every device has a cause."""
    tp, pp, dp = sizes
    result = simulate(structs.replace(
        base, tensor_parallel_size=tp, pipeline_parallel_size=pp, data_parallel_size=dp
    ))  # fmt: skip
    assert result.report.completed == result.report.requests == 300
    assert result.account is not None and len(result.account.devices) == tp * pp * dp
    walls = {use.wall_ns for use in result.account.devices.values()}
    assert len(walls) == 1, "all devices are accounted for up to the same moment"
    assert all(use.causes["unattributed"] == 0 for use in result.account.devices.values())
    assert result.verdict


def test_fast_forward_changes_nothing(base: SimulateOptions) -> None:
    """The figures and the ledger are those of stepping, with a real cost model."""
    two = structs.replace(base, tensor_parallel_size=2, data_parallel_size=2)
    fast, slow = simulate(two), simulate(structs.replace(two, fast=False))
    assert fast.report == slow.report and fast.events == slow.events
    assert fast.account is not None and slow.account is not None
    assert {n: d.causes_ns for n, d in fast.account.devices.items()} == {
        n: d.causes_ns for n, d in slow.account.devices.items()
    }


def test_a_slower_device_makes_its_peer_wait(base: SimulateOptions) -> None:
    """What the slow one computes longer, the other waits: the ledger tells who is late."""
    two = structs.replace(base, tensor_parallel_size=2)
    before = simulate(two)
    names = before.plan.devices()
    after = simulate(structs.replace(two, slow=(f"{names[1]}@0=1.5",)))
    assert before.account is not None and after.account is not None
    late, waits = after.account.devices[names[1]], after.account.devices[names[0]]
    assert late.causes["straggler"] < 0.01 * late.wall_s < 0.1 * waits.wall_s < waits.causes["straggler"]
    assert after.report.output_tok_s < before.report.output_tok_s


@pytest.mark.parametrize("rate", ["inf", "20"])
def test_batches_of_equal_time_keep_a_pipeline_full(base: SimulateOptions, rate: str) -> None:
    """Beside decoding rows prompts go in small chunks, so that no stage waits for a long batch: less bubble than with a
    token budget, more tokens where arrivals exceed what is served, and no prompt waits longer."""
    traffic = f"rate={rate},in=lognormal:500:0.8,out=lognormal:100:0.7,requests=300"
    two = structs.replace(base, pipeline_parallel_size=2, traffic=traffic)
    budget, packed = simulate(structs.replace(two, policy="fcfs")), simulate(two)
    assert budget.account is not None and packed.account is not None
    share = [r.account.total.causes["bubble"] / r.account.total.wall_ns for r in (budget, packed)]
    assert share[1] < 0.7 * share[0]
    before, after = budget.report, packed.report
    assert after.output_tok_s > (1.1 if rate == "inf" else 0.99) * before.output_tok_s
    assert after.ttft_ms.p50 is not None and before.ttft_ms.p50 is not None
    assert after.ttft_ms.p50 < before.ttft_ms.p50


def test_a_lost_device_loses_no_request(base: SimulateOptions) -> None:
    """While another replica lives, all requests complete; the lost one's time is `down`."""
    two = structs.replace(base, data_parallel_size=2)
    lost = simulate(two).plan.devices()[0]
    result = simulate(structs.replace(two, fail=(f"{lost}@3",)))
    assert result.report.completed == 300 and result.account is not None
    assert result.account.devices[lost].causes["down"] > 0


def test_auto_simulates_the_plan_that_the_planner_chooses(base: SimulateOptions) -> None:
    """`--plan auto` means what it means for serve, on devices that are not here."""
    known = {name: getattr(base, name) for name in ("model", "cluster", "traffic")}
    _, choice = make_plan(**known)
    result = simulate(structs.replace(base, plan="auto"))
    assert result.plan == choice.best.plan and result.report.completed == 300


def test_unknown_lengths_cost_something(base: SimulateOptions) -> None:
    """Asking for more than comes makes the scheduler see ends late: that is `speculation`."""
    known, unknown = simulate(base), simulate(structs.replace(base, max_tokens=2000))
    assert known.account is not None and unknown.account is not None
    assert known.account.total.causes["speculation"] == 0 < unknown.account.total.causes["speculation"]
    assert known.report.output_tokens == unknown.report.output_tokens


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"fail": ("cuda:9@3",)}, "no device 'cuda:9'"),
        ({"fail": ("nonsense",)}, "write DEVICE@SECONDS"),
        ({"slow": ("cuda:0@1",)}, "write DEVICE@SECONDS=FACTOR"),
        ({"slow": ("cuda:0@1=0.5",)}, "with a factor from 1"),
        ({"plan": "x.yaml", "data_parallel_size": 2}, "leave out -tp"),
        ({"plan": "x.yaml", "split": "equal"}, "leave out --split"),
        ({"plan": "auto", "tensor_parallel_size": 2}, "leave out -tp"),
        ({"split": "odd"}, "use time or equal"),
        ({"max_num_batched_tokens": 0}, "max_num_batched_tokens=0"),
        ({"tensor_parallel_size": 8}, "8 devices"),
        ({"policy": "x"}, "choose one of"),
        ({"router": "x"}, "choose one of"),
    ],
)
def test_bad_options_say_what_to_do(base: SimulateOptions, change: dict[str, object], words: str) -> None:
    """Each error names the value and the remedy, before anything runs."""
    with pytest.raises(EvenerError) as caught:
        simulate(structs.replace(base, **change))
    assert isinstance(caught.value, InvalidInput) and words in caught.value.message


def test_command_prints_a_table_and_json(base: SimulateOptions) -> None:
    """Both forms carry the figures, the ledger and the verdict."""
    arguments = ["simulate", str(base.model), "--cluster", str(base.cluster), "--traffic", base.traffic, "-dp", "4"]
    shown = CliRunner().invoke(app, [*arguments, "--slo", "ttft=1s,tpot=50ms"])
    assert shown.exit_code == 0, shown.output
    assert "300 of 300 requests completed" in shown.output and "no_demand" in shown.output
    told = CliRunner().invoke(app, [*arguments, "--json"])
    figures = json.loads(told.stdout)
    assert figures["report"]["completed"] == 300 and len(figures["account"]["devices"]) == 4


def test_the_same_options_give_the_same_result(base: SimulateOptions) -> None:
    """Deterministic, but for the time it took."""
    one, two = simulate(base), simulate(base)

    def told(result: Simulated) -> Simulated:
        return structs.replace(result, took_s=0.0)

    assert told(one) == told(two)
