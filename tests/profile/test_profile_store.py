"""Kept profiles: round trip, what counts as covering a cluster, and damaged files."""

import json
from pathlib import Path

import pytest
from msgspec import structs

from evener.cost.rates import FORMAT, Collective, Profile, bind, default_profile
from evener.errors import InvalidDevice, InvalidInput
from evener.profile import check_present, load_profile, local_devices, profile_path, save_profile
from evener.profile.hardware import last_level_cache, profile_key
from evener.profile.measure import rounds
from evener.spec.cluster import Cluster, parse_device


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVENER_CACHE", str(tmp_path))
    return tmp_path


def cluster(*names: str) -> Cluster:
    return Cluster(tuple(parse_device(x) for x in names))


def measured(*names: str) -> Profile:
    """As if these had been measured together."""
    profile = default_profile(cluster(*names).devices)
    devices = tuple(structs.replace(d, peers=tuple(n for n in names if n != d.name)) for d in profile.devices)
    return structs.replace(profile, devices=devices, source="measured", missing=())


def test_round_trip_binds_to_the_workers(own_cache: Path) -> None:
    assert load_profile(cluster("cpu:0")) is None
    path = save_profile(measured("cpu:0", "cpu:1"))
    assert path == profile_path() and path.parent == own_cache / "profiles"
    got = load_profile(cluster("cpu:1,slowdown=4", "cpu:1#2"))
    assert got is not None
    assert [(d.name, d.slowdown, d.sharers) for d in got.devices] == [("cpu:1", 4, 2), ("cpu:1#2", 1, 2)]
    assert [p.name for p in path.parent.iterdir()] == [path.name], "no partial file is left"


def test_only_what_was_measured_together_covers_a_cluster() -> None:
    save_profile(measured("cpu:0"))
    save_profile(measured("cpu:1"))
    assert load_profile(cluster("cpu:0")) and load_profile(cluster("cpu:1")), "a later one keeps the earlier"
    assert load_profile(cluster("cpu:0", "cpu:1")) is None, "each was measured alone"
    save_profile(measured("cpu:0", "cpu:1"))
    assert load_profile(cluster("cpu:0", "cpu:1"))
    assert load_profile(cluster("cpu:0", "cpu:1", "cpu:2")) is None


def test_collectives_of_the_same_ranks_are_replaced() -> None:
    def with_latency(ranks: int, ns: float) -> Profile:
        return structs.replace(measured("cpu:0"), collectives=(Collective("shm", ranks, ((8, ns),)),))

    for ranks, ns in ((2, 1.0), (3, 2.0), (2, 5.0)):
        save_profile(with_latency(ranks, ns))
    got = load_profile(cluster("cpu:0"))
    assert got is not None
    assert {c.ranks: c.points[0][1] for c in got.collectives} == {2: 5.0, 3: 2.0}


@pytest.mark.parametrize(
    "damage",
    [
        b"",
        b"not json",
        b"\xff\xfe",
        f'{{"format": {FORMAT}}}'.encode(),
        f'{{"format": {FORMAT}, "devices": 3, "collectives": [], "source": "measured"}}'.encode(),
    ],
)
def test_a_damaged_file_says_how_to_measure_again(damage: bytes) -> None:
    path = save_profile(measured("cpu:0"))
    path.write_bytes(damage)
    with pytest.raises(InvalidInput, match=r"profile .*\.json is damaged: .*run `evener devices` to measure again"):
        load_profile(cluster("cpu:0"))
    save_profile(measured("cpu:0"))
    assert load_profile(cluster("cpu:0")), "measuring again mends it"


def test_impossible_figures_are_damage() -> None:
    path = save_profile(measured("cpu:0"))
    raw = json.loads(path.read_text())
    raw["devices"][0]["alone"]["read_bandwidth"] = 0
    path.write_text(json.dumps(raw))
    with pytest.raises(InvalidInput, match="read_bandwidth is 0"):
        load_profile(cluster("cpu:0"))


def test_another_format_is_measured_again() -> None:
    save_profile(structs.replace(measured("cpu:0"), format=999))
    assert load_profile(cluster("cpu:0")) is None


def test_rounds_never_share_a_core() -> None:
    units = cluster("cpu:0", "cpu:0-1", "cpu:1", "cpu:2", "cuda:0").devices
    assert [[d.name for d in group] for group in rounds(units)] == [["cpu:0", "cpu:1", "cpu:2", "cuda:0"], ["cpu:0-1"]]


def test_local_devices_are_here_and_others_are_not() -> None:
    here = local_devices()
    assert here
    check_present(here)
    with pytest.raises(InvalidDevice, match=r"core 9999 is not available to this process \(available: "):
        check_present(cluster("cpu:9999").devices)


def test_the_key_is_stable_and_fit_for_a_file_name() -> None:
    assert profile_key() == profile_key()
    assert "/" not in profile_key() and len(profile_key()) < 100
    assert last_level_cache() >= 1 << 18


def test_binding_twice_is_binding_once() -> None:
    workers = cluster("cpu:0,slowdown=2", "cpu:0#1").devices
    once = bind(measured("cpu:0"), workers)
    assert bind(once, workers) == once
