"""`evener plan --check` and `--what-if` against a server whose requests took just what its cost model says."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from fake import FakeEngine
from served_story import LENGTHS, asked, busy_engine
from serving import serve
from typer.testing import CliRunner

from evener.cli import served as client
from evener.cli.main import app
from evener.errors import EvenerError, InvalidInput, InvalidPlan, Unavailable

WHOLE = "replicas: [{stages: [{shards: ['cpu:0']}]}]"
TWO = "replicas: [{stages: [{shards: ['cpu:0', 'cpu:1']}]}]"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    yield from serve(busy_engine())


def run(*arguments: str) -> str:
    done = CliRunner().invoke(app, ["plan", *arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return done.stdout


def check(url: str, *arguments: str) -> dict[str, Any]:
    said: dict[str, Any] = json.loads(run("--check", url, "--json", *arguments))
    return said


def test_a_perfect_cost_model_is_right(url: str) -> None:
    """Only lengths and times went over the wire, and every figure that is predicted was achieved."""
    said = check(url)
    assert (said["requests"], said["around"], said["cut"]) == (len(LENGTHS), 0, "")
    assert (said["dtype"], said["kv_dtype"], said["model"], said["source"]) == ("fp32", "fp32", "tiny", url)
    figures = {x["what"]: x for x in said["figures"]}
    wanted = {"output tok/s", *(f"{w} {k}, ms" for w in ("TTFT", "TPOT") for k in ("mean", "p50", "p90"))}
    assert wanted <= set(figures) and {"prefill, %", "decode, %"} <= set(figures)
    for what, x in figures.items():
        # A window may begin inside one of the ledger's checkpoints, whose causes are then taken in proportion.
        assert x["predicted"] == pytest.approx(x["achieved"], abs=0.5 if what.endswith("%") else 1e-4), what
    assert said["predicted"]["report"]["output_tokens"] == sum(o for _, o in LENGTHS)


def test_what_people_see(url: str) -> None:
    said = run("--check", url + "/v1", "--window", "3600")
    for part in (
        "plan plan, tiny in fp32 with fp32 KV",
        "cpu:0: layers [0, 1)",
        "6 requests in",
        "predicted",
        "achieved",
    ):
        assert part in said
    assert "run `evener devices`" in said, "the speeds are assumed"
    assert "contended" not in said and "prefix cache" not in said


def test_what_another_plan_would_have_done(url: str, tmp_path: Path) -> None:
    """The same plan again does the same."""
    path = tmp_path / "same.yaml"
    path.write_text(WHOLE)
    said = check(url, "--what-if", str(path))
    assert said["what_if"]["report"] == said["predicted"]["report"]
    assert {x["what_if"] for x in said["figures"] if x["what"] == "output tok/s"} == {said["figures"][0]["predicted"]}
    assert "same.yaml" in run("--check", url, "--what-if", str(path))


def test_a_plan_on_other_devices_is_refused(url: str, tmp_path: Path) -> None:
    path = tmp_path / "two.yaml"
    path.write_text(TWO)
    with pytest.raises(InvalidPlan, match=r"two.yaml uses cpu:1, the run used cpu:0"):
        run("--check", url, "--what-if", str(path))


def test_requests_beside_those_of_the_window_load_the_simulation_too() -> None:
    """A long answer that ended before the window slowed those in it; alone they would have been faster."""
    traffic = [asked(0, 1000, 200, 20), asked(1, 1000.001, 200, 31), asked(2, 9000, 10, 2)]
    engine = busy_engine(traffic)
    assert engine.kept is not None
    ended = engine.log.requests[1].ended
    assert ended is not None
    for url in serve(engine):
        said = check(url, "--window", str((engine.kept.now - ended) / 1e9 + 1e-5))
        assert (said["requests"], said["around"]) == (2, 1)
        for x in said["figures"]:
            if x["what"].startswith(("TTFT", "TPOT")):
                assert x["error"] == pytest.approx(0, abs=1e-3), x
        assert "1 more ran beside them" in run("--check", url, "--window", str((engine.kept.now - ended) / 1e9 + 1e-5))


def test_prefix_hits_are_simulated_from_their_lengths() -> None:
    """Prompts that share their first 64 tokens: what was found in the cache is not computed again in the simulation."""
    shared = [asked(0, 1000 + 500 * k, 80, 4) for k in range(6)]
    for url in serve(busy_engine(shared)):
        said = check(url)
        assert said["achieved"]["account"]["replicas"]["0"]["prefill_tokens"] < 6 * 80
        assert any("prefix cache" in note for note in said["notes"])
        predicted, achieved = (said[k]["account"]["replicas"]["0"]["prefill_tokens"] for k in ("predicted", "achieved"))
        # The first that finds something finds it, in the simulation, only after one that computed it.
        assert achieved <= predicted <= achieved + 64


def empty() -> FakeEngine:
    return FakeEngine()


def no_ledger() -> FakeEngine:
    made = busy_engine()
    made.kept = None
    return made


@pytest.mark.parametrize(
    ("engine", "flags", "error", "says"),
    [
        (empty, [], InvalidInput, r"completed no request so far \(0 still run, 0 failed.*send requests"),
        (busy_engine, ["--window", "0.001"], InvalidInput, r"in its last 0.001 s .*longer --window"),
        (no_ledger, [], Unavailable, "without --no-ledger"),
    ],
)
def test_servers_with_nothing_to_compare(
    engine: Callable[[], FakeEngine], flags: list[str], error: type[EvenerError], says: str
) -> None:
    made = engine()
    if made.kept is not None:
        made.kept.settle(made.kept.now + 10**9)  # type: ignore[arg-type]
    for url in serve(made):
        with pytest.raises(error, match=says):
            run("--check", url, *flags)


def test_a_key(url: str) -> None:
    for locked in serve(busy_engine(), key="secret"):
        with pytest.raises(InvalidInput, match="--api-key"):
            run("--check", locked)
        assert check(locked, "--api-key", "secret")["requests"] == 6


def test_another_version(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "VERSION", "9.9")
    with pytest.raises(Unavailable, match=r"is Evener .* this is 9.9 .*check it with the version that serves"):
        run("--check", url)


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (["--check", "http://127.0.0.1:9"], Unavailable, "is `evener serve` running there"),
        (["--check", "nowhere"], InvalidInput, "'nowhere' is neither the URL of a server"),
        (["--check", "nowhere", "--dtype", "int8", "--size"], InvalidInput, "leave out dtype, size"),
        (["model", "--check", "nowhere"], InvalidInput, "leave out model"),
        (["--window", "5"], InvalidInput, "are for --check"),
        (["--check", "nowhere", "--window", "0"], InvalidInput, "--window 0 is no number of seconds above 0"),
        (["--check", "nowhere", "--window", "nan"], InvalidInput, "--window nan is no number of seconds"),
    ],
)
def test_refusals(arguments: list[str], error: type[EvenerError], says: str) -> None:
    with pytest.raises(error, match=says):
        run(*arguments)
