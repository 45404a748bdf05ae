"""`evener plan` from the command line: what it prints and writes, and what it refuses."""

import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evener.cli.main import app
from evener.errors import EvenerError, InvalidDevice, InvalidInput, InvalidPlan, InvalidTrace
from evener.plan.search import search
from evener.plan.stages import Stages
from evener.planning import PlanOptions, make_plan, make_problem
from evener.spec.cluster import parse_device
from evener.workload.spec import parse_traffic

CONFIG = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 256, "intermediate_size": 512,
    "num_attention_heads": 4, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 1000,
    "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "tie_word_embeddings": False,
}  # fmt: skip
CLUSTER = """
hosts:
  - {name: far, devices: [{device: "cuda:0", profile: t4, count: 2}]}
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVENER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "cluster.yaml").write_text(CLUSTER)
    return tmp_path


def run(folder: Path, *args: str) -> str:
    command = ["plan", str(folder / "config.json"), "--requests", "16", "--max-num-seqs", "4", *args]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_a_plan_is_chosen_explained_and_written(folder: Path) -> None:
    out = folder / "plan.yaml"
    said = run(folder, "--devices", "cpu:0 cpu:1,slowdown=3", "--traffic", "in=32,out=8", "-o", str(out))
    for part in (
        "What binds",
        "One device more",
        "Why not the usual layouts",
        "all TP, equal",
        "never back-tested here",
    ):
        assert part in said
    assert out.read_text().startswith("name:")


def test_the_command_that_serves_the_plan_says_what_the_plan_does_not(folder: Path) -> None:
    """Slow-downs, memory and dtypes as planned; nothing for devices that are not here."""
    out = folder / "plan.yaml"
    devices, traffic = "cpu:0,memory=64MiB cpu:1,slowdown=1.5", ("--traffic", "in=32,out=8")
    said = run(folder, "--devices", devices, *traffic, "--dtype", "int8", "--kv-dtype", "bf16", "-o", str(out))
    command = next(line for line in said.splitlines() if line.startswith("wrote ")).partition(": ")[2]
    given = shlex.split(command)
    # The model as well: without it another one would be served, and the plan refused.
    assert given[:5] == ["evener", "serve", str(folder), "--plan", str(out)]
    options = dict(zip(given[5::2], given[6::2], strict=True))
    wanted = [parse_device(d) for d in devices.split()]
    assert [parse_device(d) for d in options["--devices"].split()] == wanted
    assert (options["--dtype"], options["--kv-dtype"], options["--max-num-seqs"]) == ("int8", "bf16", "4")
    assert "evener serve" not in run(folder, "--cluster", str(folder / "cluster.yaml"), *traffic, "-o", str(out))


def test_int8_plans_are_cut_where_serve_takes_them(folder: Path) -> None:
    """Shards of a layer quantise their own inputs: cuts inside a group of the scales are refused."""
    said = ("cpu:0", "cpu:1,slowdown=2.3", "cpu:0#1,slowdown=3")
    options = PlanOptions(model=str(folder / "config.json"), devices=said, traffic="in=32,out=8", dtype="int8")
    problem = make_problem(options)
    split = [s for scored in search(problem) for r in scored.plan.replicas for s in r.stages if len(s.shards) > 1]
    assert split and {
        cut % problem.model.ffn_unit for stage in split for shard in stage.shards for cut in shard.ffn
    } == {0}


def test_json_says_everything(folder: Path) -> None:
    args = ("--devices", "cpu:0 cpu:1", "--traffic", "rate=5,in=32,out=8", "--slo", "ttft=5s", "--json")
    said = json.loads(run(folder, *args))
    assert said["goal"] == "goodput" and said["profile"] == "default" and said["demand"]["rate"] == 5
    ledger = said["predicted"]["ledger"]
    assert set(ledger) == set(said["predicted"]["devices"])
    assert all(sum(causes.values()) == pytest.approx(1.0) for causes in ledger.values())


def test_absent_gpus_from_a_cluster_file(folder: Path) -> None:
    args = ("--cluster", str(folder / "cluster.yaml"), "--traffic", "in=32,out=8", "--emit", "vllm", "--json")
    said = json.loads(run(folder, *args))
    assert said["profile"] == "published"
    assert all("vllm serve" in x["command"] for x in said["launch"])


def test_layouts_are_judged(folder: Path) -> None:
    args = ("--devices", "cpu:0 cpu:1,slowdown=4", "--traffic", "in=32,out=8", "--assess", "tp=2", "--assess", "tp=8")
    said = run(folder, *args)
    assert "tp=2,pp=1,dp=1: wasteful" in said and "straggler" in said
    assert "tp=8,pp=1,dp=1: cannot serve" in said


def test_what_another_plan_would_do(folder: Path) -> None:
    (folder / "other.yaml").write_text("replicas: [{stages: [{shards: ['cpu:1']}]}]")
    args = ("--devices", "cpu:0 cpu:1,slowdown=4", "--traffic", "in=32,out=8", "--what-if", str(folder / "other.yaml"))
    said = json.loads(run(folder, *args, "--json"))
    (row,) = said["assessed"]
    assert row["layout"] == "what if: other.yaml" and row["verdict"] == "wasteful"
    assert row["predicted"]["capacity_tok_s"] < said["choice"]["capacity_tok_s"]


def test_sizes(folder: Path) -> None:
    args = ("--devices", "cpu:0", "--traffic", "rate=1,in=32,out=8", "--size", "--json")
    said = json.loads(run(folder, *args))
    assert said["sizes"][0]["count"] == 1


def test_what_fits_no_device_is_planned_over_several(folder: Path) -> None:
    four = " ".join(f"cpu:{k},memory=8MiB" for k in range(4))
    _, choice = make_plan(model=str(folder / "config.json"), devices=tuple(four.split()), traffic="in=32,out=8",
                          max_num_seqs=4, requests=8)  # fmt: skip
    assert all(len(r.devices()) > 1 for r in choice.best.plan.replicas)


def test_devices_that_alone_hold_no_layer_serve_together(folder: Path) -> None:
    eight = tuple(f"cpu:{k},memory=4MiB" for k in range(8))
    problem, choice = make_plan(model=str(folder / "config.json"), devices=eight, traffic="in=32,out=8",
                                max_num_seqs=4, requests=8)  # fmt: skip
    stages = Stages(problem, problem.cluster.devices, nearly=True)
    assert stages.option(("cpu:0",), first=False, last=False) is None, "the test's own premise"
    assert any(len(stage.shards) > 1 for stage in choice.best.plan.replicas[0].stages)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"devices": ("cpu:0", "cpu:0")}, InvalidDevice, "named twice"),
        ({"devices": ("cpu:0",), "cluster": "x.yaml"}, InvalidInput, "leave out --devices"),
        ({"devices": ("cpu:0",), "traffic": "in=4000,out=8"}, InvalidInput, "context is 2048; shorten"),
        ({"devices": ("cpu:0",), "dtype": "fp7"}, InvalidInput, "--dtype 'fp7' is not one of"),
        ({"devices": ("cpu:0",), "traffic": "rate=0"}, InvalidTrace, "must be a positive number"),
        ({"devices": ("cpu:0",), "traffic": "speed=3"}, InvalidTrace, "is not one of rate, in, out"),
        ({"devices": ("cpu:0",), "slo": "ttft=2"}, InvalidInput, "with a unit"),
        ({"devices": ("cpu:0,memory=1MiB",), "traffic": "in=32,out=8"}, InvalidPlan, "bytes short"),
        ({"devices": ("cpu:0",), "slo": "ttft=2s"}, InvalidInput, "the traffic has no rate.*give rate="),
        ({"devices": ("cpu:0",), "slo": "e2e=9s,tpot=1s"}, InvalidInput, "or bound tpot alone"),
    ],
)
def test_refusals(folder: Path, options: dict[str, object], error: type[EvenerError], message: str) -> None:
    with pytest.raises(error, match=message):
        make_plan(model=str(folder / "config.json"), **options)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--size", "--output", "plan.yaml"), "--size answers with numbers of devices"),
        (("--size", "--plot", "front.png"), "--size answers with numbers of devices"),
        (("--emit", "vllm", "--assess", "tp=1"), "--emit prints commands for the chosen plan"),
        (("--emit", "ray"), "is not one of vllm, sglang"),
        (("--costs", "magic"), "--costs 'magic' is not one of rates, tables"),
        (("--costs", "tables"), "device cpu:0: no measured operators for it; there are some for"),
        (("--output", "/nowhere/plan.yaml"), "there is no directory /nowhere"),
    ],
)
def test_what_would_be_ignored_is_refused(folder: Path, args: tuple[str, ...], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        run(folder, "--devices", "cpu:0", "--traffic", "rate=1,in=32,out=8", *args)


def test_unknown_options_are_refused() -> None:
    with pytest.raises(InvalidInput, match="option 'speed' is unknown"):
        make_plan(speed=3)
    assert PlanOptions().policy == "equal-time"


def test_traffic_is_that_of_bench(folder: Path) -> None:
    """The same lengths and arrivals as `evener bench` draws from the same seed."""
    from evener.workload.traffic import Traffic, make_requests

    ours = parse_traffic("rate=3,in=uniform:8:90,out=lognormal:20:0.5,requests=20,seed=4,burstiness=0.5").trace.rows
    lengths = {"input_tokens": "uniform:8:90", "output_tokens": "lognormal:20:0.5"}
    theirs = make_requests(Traffic(requests=20, rate=3, burstiness=0.5, seed=4, **lengths))
    assert [(r.arrival_s, r.input_tokens, r.output_tokens) for r in ours] == [
        (r.arrival_s, r.input_tokens, r.output_tokens) for r in theirs
    ]


def test_traces_with_and_without_arrivals(folder: Path) -> None:
    timed, plain = folder / "timed.csv", folder / "plain.csv"
    timed.write_text("arrival_s,input_tokens,output_tokens\n0,10,5\n2,20,6\n4,30,7\n")
    plain.write_text("input_tokens,output_tokens\n10,5\n20,6\n")
    assert parse_traffic(str(timed)).rate == 0.5
    assert parse_traffic(f"trace={timed},scale=2,requests=2").rate == 1.0
    assert parse_traffic(str(plain)).rate is None
    with pytest.raises(InvalidTrace, match="leave it out"):
        parse_traffic(f"trace={timed},rate=2")
    with pytest.raises(InvalidTrace, match="requests='1e12' exceeds the limit of 10000000"):
        parse_traffic("requests=1e12")
    problem = make_problem(PlanOptions(model=str(folder / "config.json"), devices=("cpu:0",), traffic=str(timed)))
    assert problem.demand.input_tokens == 20 and problem.demand.longest == 37


def test_back_tests_give_the_error_bar(folder: Path) -> None:
    from evener.plan.backtests import BackTest, backtests_path, describe_model, error_bar, keep_backtest

    model = make_problem(PlanOptions(model=str(folder / "config.json"), traffic="in=32,out=8")).model
    assert error_bar(model, ("cpu:0",), "fp32", "fp32") is None
    for predicted in (90.0, 120.0, 103.0):
        kept = BackTest(describe_model(model), "tp2", ("cpu:0", "cpu:1"), predicted, 100.0, "fp32", "fp32")
        keep_backtest(kept)
    assert error_bar(model, ("cpu:0",), "fp32", "fp32") is None, "another set of devices"
    bar = error_bar(model, ("cpu:0", "cpu:1", "cpu:2"), "fp32", "fp32")
    assert bar is not None and (bar.count, round(bar.median, 6), round(bar.greatest, 6)) == (3, 0.1, 0.2)
    assert "off by 10% in the median" in run(folder, "--devices", "cpu:0 cpu:1", "--traffic", "in=32,out=8")
    backtests_path().write_text("[")
    with pytest.raises(InvalidInput, match="delete the file"):
        error_bar(model, ("cpu:0",), "fp32", "fp32")


def test_back_tests_tell_dtypes_apart(folder: Path) -> None:
    """An error found in one dtype says nothing of another; one that does not say its dtype says nothing at all."""
    from evener.plan.backtests import BackTest, backtests_path, describe_model, error_bar, keep_backtest

    model = make_problem(PlanOptions(model=str(folder / "config.json"), traffic="in=32,out=8")).model
    two = ("cpu:0", "cpu:1")
    backtests_path().parent.mkdir(parents=True)
    old = {"model": describe_model(model), "plan": "tp2", "devices": two, "predicted_tok_s": 50, "achieved_tok_s": 10}
    backtests_path().write_text(json.dumps([old]))
    keep_backtest(BackTest(describe_model(model), "tp2", two, 130.0, 100.0, "int8", "bf16"))
    assert error_bar(model, two, "fp32", "fp32") is None and error_bar(model, two, "int8", "int8") is None
    bar = error_bar(model, two, "int8", "bf16")
    assert bar is not None and (bar.count, round(bar.median, 6)) == (1, 0.3)
    args = ("--devices", "cpu:0 cpu:1", "--traffic", "in=32,out=8", "--dtype", "int8")
    assert "in int8 with bf16 KV on these devices, off by 30%" in run(folder, *args, "--kv-dtype", "bf16")
    assert "never back-tested here in int8 with int8 KV" in run(folder, *args)
