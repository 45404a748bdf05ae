"""The same traffic through several engines, simulated: figures and ledgers that can be set side by side."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from evener.api import make_options
from evener.cli.main import app
from evener.errors import InvalidInput
from evener.ledger.causes import Cause
from evener.workload.compare import Case, Compared, compare, requests_of, warm_up_of
from evener.workload.slo import Slo
from evener.workload.spec import parse_traffic
from evener.workload.table import table

TWO = ("cpu:0", "cpu:0#1")
REQUESTS = requests_of(parse_traffic("requests=10,in=lognormal:60:0.8:8:200,out=lognormal:20:0.7:4:60"))


def case(name: str, **options: object) -> Case:
    return Case(name, make_options(devices=TWO, **options))


CASES = [
    case("tensor", tensor_parallel_size=2),
    case("padded", data_parallel_size=2, policy="static", split="equal", static_batch=4),
    Case("unlike", make_options(devices=("cpu:0", "cpu:0#1,slowdown=3"), tensor_parallel_size=2, split="equal")),
]


@pytest.fixture(scope="module")
def results() -> list[Compared]:
    return compare(CASES, REQUESTS)


def test_every_case_serves_all_and_closes_its_ledger(results: list[Compared]) -> None:
    for result in results:
        assert result.report.completed == len(REQUESTS) and not result.live
        assert result.report.output_tokens == sum(r.output_tokens for r in REQUESTS)
        window = round(result.account.window_s * 1e9)
        assert {d.wall_ns for d in result.account.devices.values()} == {window}
        assert result.report.duration_s == pytest.approx(result.account.window_s)


def test_losses_are_found_where_they_are(results: list[Compared]) -> None:
    tensor, padded, unlike = (r.account for r in results)
    assert padded.total.share(Cause.PADDING) > 0.05 and tensor.total.share(Cause.PADDING) == 0
    waits = {name: d.share(Cause.STRAGGLER) for name, d in unlike.devices.items()}
    assert waits["cpu:0"] > 0.4 > 0.05 > waits["cpu:0#1"]


def test_goodput_counts_what_meets_the_bounds(results: list[Compared]) -> None:
    typical = results[0].report.e2e_ms.p50
    tensor, unlike = compare([CASES[0], CASES[2]], REQUESTS, slo=Slo(e2e_ms=typical))
    every = results[0].report.completed / results[0].report.duration_s
    assert results[0].report.goodput_req_s == pytest.approx(every)
    assert every > tensor.report.goodput_req_s > unlike.report.goodput_req_s


def test_a_simulation_repeats_itself(results: list[Compared]) -> None:
    assert compare(CASES[:1], REQUESTS) == results[:1]


def test_the_table_has_a_cell_per_case_and_shares_that_sum_up(results: list[Compared]) -> None:
    rows = table(results)
    assert all(len(cells) == len(results) for _, cells in rows)
    labels = {f"{c.label}, %" for c in Cause}
    for k in range(len(results)):
        shares = sum(float(cells[k]) for what, cells in rows if what in labels)
        assert shares == pytest.approx(100, abs=0.1 * len(Cause))
    assert "padding, %" in dict(rows) and "migration, %" not in dict(rows)


def test_warm_up_has_other_prompts() -> None:
    warm = warm_up_of(REQUESTS, 3)
    assert [w.input_tokens for w in warm] == [r.input_tokens for r in REQUESTS[:3]]
    assert all(
        w.prompt != r.prompt and w.output_tokens <= 8 and not w.arrival_s
        for w, r in zip(warm, REQUESTS[:3], strict=True)
    )


@pytest.mark.parametrize(
    ("cases", "rounds", "says"),
    [
        ([], 1, "nothing to compare"),
        ([case("a")], 0, "rounds=0"),
        ([case("a")], 2, "--live"),
        ([case("fine"), case("pipe", pipeline_parallel_size=2, policy="nix")], 1, "case 'pipe': policy 'nix'"),
        ([case("short", max_model_len=20)], 1, "case 'short': request"),
        ([case("blind", ledger=False)], 1, "case 'blind': ledger=False"),
        ([Case("queue", make_options(devices=TWO), frozenset({"max_queue"}))], 1, "leave out --max-queue"),
    ],
)  # fmt: skip
def test_what_cannot_run_is_refused_before_anything_does(cases: list[Case], rounds: int, says: str) -> None:
    with pytest.raises(InvalidInput, match=says.replace("(", r"\(")):
        compare(cases, REQUESTS, rounds=rounds)


def test_the_command(tmp_path: Path) -> None:
    file = tmp_path / "cases.yaml"
    file.write_text("replicas: -dp 2\n")
    args = ["compare", "--devices", " ".join(TWO), "--cases", str(file), "--case", "tensor: -tp 2"]
    args += ["--traffic", "requests=4,in=20,out=5"]
    done = CliRunner().invoke(app, [*args, "--json"])
    assert done.exit_code == 0, done.output
    figures = json.loads(done.stdout)
    assert [c["name"] for c in figures["cases"]] == ["replicas", "tensor"]
    one = figures["cases"][1]
    assert one["report"]["completed"] == 4 and set(one["account"]["devices"]) == set(TWO)
    shown = CliRunner().invoke(app, args)
    assert shown.exit_code == 0 and "useful, %" in shown.stdout and "tensor" in shown.stdout


def test_devices_that_are_not_here(tmp_path: Path) -> None:
    """A cluster file's GPUs are simulated; what only a live engine knows is refused."""
    cluster = tmp_path / "cluster.yaml"
    cluster.write_text('hosts:\n  - {name: far, devices: [{device: "cuda:0", profile: l4, count: 2}]}\n')
    args = ["compare", "--cluster", str(cluster), "--traffic", "requests=8,in=50,out=10", "--json"]
    done = CliRunner().invoke(app, [*args, "--case", "tensor: -tp 2", "--case", "small: -dp 2 --max-num-seqs 1"])
    assert done.exit_code == 0, done.output
    tensor, small = json.loads(done.stdout)["cases"]
    assert list(tensor["account"]["devices"]) == ["far/cuda:0", "far/cuda:1"]
    assert tensor["report"]["completed"] == small["report"]["completed"] == 8
    assert small["report"]["ttft_ms"]["p90"] > tensor["report"]["ttft_ms"]["p90"]
    for flags, says in (["--case", "a: --record x"], "record means nothing"), (["--live"], "leave out --cluster"):
        refused = CliRunner().invoke(app, [*args, *flags])
        assert isinstance(refused.exception, InvalidInput) and says in refused.exception.message


@pytest.mark.parametrize("given", [["--split", "equal"], ["-tp", "2"]])
@pytest.mark.parametrize("plan", ["auto", "plan.yaml"])
def test_what_a_plan_says_itself_is_refused_beside_it(plan: str, given: list[str]) -> None:
    """It would be ignored."""
    ran = CliRunner().invoke(app, ["compare", "--plan", plan, *given])
    assert isinstance(ran.exception, InvalidInput)
    assert given[0] in ran.exception.message and "leave out" in ran.exception.message
