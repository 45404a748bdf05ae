"""Measuring for real: probes start, answer, end; what they say fits together. No assertion on speed."""

import json
import os
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from evener.cli.devices import devices
from evener.cost.rates import Profile
from evener.errors import InvalidDevice, InvalidInput, WorkerLost
from evener.profile import load_profile, local_devices, measure
from evener.profile.items import Gemm, OpOverhead, Setup
from evener.profile.process import ProbeProcess
from evener.spec.cluster import Cluster, parse_device

app = typer.Typer()
app.command()(devices)
FIRST = local_devices()[0]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVENER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def run(*args: str) -> tuple[str, BaseException | None]:
    result = CliRunner().invoke(app, args)
    return result.stdout, result.exception


@pytest.mark.slow
def test_devices_are_measured_kept_and_shown(own_cache: Path) -> None:
    names = [d.name for d in local_devices()[:2]]
    out, error = run(*names, "--quick", "--json", "--write", str(own_cache / "out.json"))
    assert error is None
    raw = json.loads(out)
    assert [d["name"] for d in raw["devices"]] == names and raw["source"] == "measured"
    assert (own_cache / "out.json").exists()

    cluster = Cluster(tuple(parse_device(x) for x in names))
    profile = load_profile(cluster)
    assert isinstance(profile, Profile)
    for d in profile.devices:
        assert set(d.peers) == set(names) - {d.name}
        for rates in (d.alone, d.together):
            fp32 = next(t for t in rates.gemm if t.dtype == "fp32")
            assert [rows for rows, _ in fp32.points] == [1, 16, 256]
    if len(names) > 1:
        assert [c.ranks for c in profile.collectives] == [2]

    out, error = run("--stored", *names, f"{names[0]}#1")
    assert error is None
    assert "GEMM in GFLOP/s" in out and "one of 2 workers" in out


@pytest.mark.slow
def test_a_probe_that_dies_is_reported_not_waited_for() -> None:
    probe = ProbeProcess(FIRST.name, Setup("cpu", FIRST.cores, 0, 1 << 20))
    try:
        probe.wait_ready()
        probe.ask(OpOverhead(), 0.001)
        value = probe.answer().value
        assert value is not None and value > 0
        probe.ask(Gemm("fp7", 1), 0.001)  # no such dtype: the probe breaks on it
        with pytest.raises(WorkerLost, match=rf"{FIRST.name}.*ended with status 1: KeyError: 'fp7'"):
            probe.answer()
    finally:
        probe.close()


def test_what_cannot_be_measured_is_refused_before_anything_starts() -> None:
    with pytest.raises(InvalidDevice, match="no device to measure"):
        measure(Cluster(()))
    with pytest.raises(InvalidDevice, match="core 9999 is not available"):
        measure(Cluster((parse_device("cpu:9999"),)))


def test_command_line_errors() -> None:
    _, error = run("cpu:0", "--devices", "cpu:0")
    assert isinstance(error, InvalidDevice) and "named twice; name a second worker on it, like cpu:0#1" in str(error)
    _, error = run("--stored", FIRST.name)
    assert isinstance(error, InvalidInput) and "run `evener devices` to measure" in str(error)
    _, error = run("gpu0")
    assert isinstance(error, InvalidDevice)


def test_measuring_needs_no_affinity_of_its_own() -> None:
    assert {core for d in local_devices() for core in d.cores} == os.sched_getaffinity(0)
