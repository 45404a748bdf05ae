"""Clusters from YAML, and profiles of devices that are not here."""

from pathlib import Path

import numpy as np
import pytest
from msgspec import structs

from evener.cost.base import BatchShape
from evener.cost.published import GEMM_SHARE, READ_SHARE, cluster_profile, published_rates
from evener.cost.rates import default_profile
from evener.cost.roofline import RooflineCostModel
from evener.errors import InvalidDevice, InvalidInput
from evener.profile import check_present, load_cluster
from evener.spec.cluster import Cluster, Device, Link, parse_device
from evener.spec.links import Links
from evener.spec.model import ModelSpec
from evener.spec.peaks import PUBLISHED
from evener.spec.plan import Plan, Replica, Shard, Stage, split_even
from evener.units import Seconds

LLAMA_8B = ModelSpec("llama", 128256, 4096, 32, 32, 8, 128, 14336, 131072)

UNLIKE = """
hosts:
  - devices: ["cpu:0,slowdown=2", {device: "cpu:1", memory: 4GiB}]
  - {name: far, count: 2, devices: [{device: "cuda:0", profile: h100_sxm, count: 4}]}
  - name: old
    link: {bandwidth: 12GB/s, latency: 5us}
    devices:
      - {device: "cuda:0", profile: t4, count: 2, memory: 15GiB}
      - {device: "cuda:2", peaks: {flops: {fp16: 40e12}, bandwidth: 500e9}, memory: 8GB}
links:
  - {between: [far-0, far-1], bandwidth: 400Gbit/s, latency: 3us}
  - {between: ["far-0/cuda:0", "old/cuda:0"], bandwidth: 1GB/s, latency: 1ms}
"""


def written(tmp_path: Path, text: str) -> Path:
    file = tmp_path / "cluster.yaml"
    file.write_text(text)
    return file


def tensor(names: list[str], model: ModelSpec = LLAMA_8B) -> Plan:
    parts = [split_even(n, len(names)) for n in (model.heads, model.ffn, model.vocab, model.vocab)]
    shards = tuple(Shard(name, *cut) for name, *cut in zip(names, *parts, strict=True))
    return Plan((Replica((Stage((0, model.layers), shards),)),))


def test_hosts_devices_and_links(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, UNLIKE))
    names = [d.name for d in cluster.devices]
    assert names[:3] == ["cpu:0", "cpu:1", "far-0/cuda:0"] and names[-1] == "old/cuda:2" and len(names) == 13
    assert cluster.device("cpu:0").slowdown == 2 and cluster.device("cpu:1").memory == 4 << 30
    assert cluster.device("far-1/cuda:3").memory == 80 * 10**9 and cluster.device("old/cuda:1").memory == 15 << 30
    links = Links(cluster.links)
    (inside,) = links.between(["far-0/cuda:0"], ["far-0/cuda:1"])
    assert inside.bandwidth == 450e9
    (across,) = links.between(["far-0/cuda:0"], ["far-1/cuda:1"])
    assert (across.bandwidth, across.delay) == (50e9, pytest.approx(3e-6))
    assert [x.delay for x in links.between(["far-0/cuda:0"], ["old/cuda:0"])] == [1e-3]
    (assumed,) = links.between(["cpu:0"], ["old/cuda:1"])
    assert assumed.bandwidth == 1.25e9
    (slow,) = links.between(["old/cuda:0"], ["old/cuda:2"])
    assert slow.bandwidth == 12e9
    assert links.between(["cpu:0"], ["cpu:1"]) == []  # as fast as measured


def test_devices_elsewhere_are_not_served(tmp_path: Path) -> None:
    cluster = load_cluster(written(tmp_path, UNLIKE))
    with pytest.raises(InvalidDevice, match=r"far-0/cuda:0 is on host far-0.*planned for and simulated"):
        check_present(cluster.devices)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("hosts: 3", "hosts must be a list"),
        ("hosts: []\nlinkz: []", "'linkz' is unknown"),
        ('hosts: [{name: a, devices: ["cuda:0"]}]', "a/cuda:0 cannot be measured from here"),
        ('hosts: [{name: a, devices: [{device: "cuda:0", profile: gtx}]}]', "no published peaks for 'gtx'.*h100_sxm"),
        ('hosts: [{devices: [{device: "cuda:0", profile: t4, slowdown: 0.5}]}]', "slowdown=0.5"),
        ('hosts: [{devices: [{device: "cpu:0-3", count: 2}]}]', "count=2"),
        ('hosts: [{devices: ["cpu:0", "cpu:0"]}]', "cpu:0 is named twice"),
        ('hosts: [{count: 2, devices: ["cpu:0"]}]', "this host is there once"),
        ('hosts: [{devices: ["cpu:0"]}]\nlinks: [{between: [x, "cpu:0"]}]', "'x' is no device or host"),
        ('hosts: [{devices: ["cpu:0"]}]\nlinks: [{between: ["cpu:0", "cpu:0"], bandwidth: fast}]', "bandwidth='fast'"),
        ("hosts: [", "is not YAML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, named: str) -> None:
    with pytest.raises(InvalidDevice, match=named) as caught:
        load_cluster(written(tmp_path, text))
    assert "cluster.yaml" in caught.value.message


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidDevice, match=r"none\.yaml does not exist"):
        load_cluster(tmp_path / "none.yaml")


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_published_rates_keep_to_their_shares(name: str) -> None:
    peaks = PUBLISHED[name]
    rates = published_rates(peaks)
    assert rates.read_bandwidth == peaks.bandwidth * READ_SHARE and peaks.source
    for dtype, width in (("fp32", 4), ("fp16", 2)):
        assert rates.gemm_ns(dtype, 1) == pytest.approx(width / rates.read_bandwidth * 1e9, rel=0.02)
        assert rates.gemm_ns(dtype, 4096) == pytest.approx(2e9 * 4096 / ((peaks.flop_rate(dtype) or 0) * GEMM_SHARE))


def test_decoding_one_row_takes_as_long_as_reading_the_weights() -> None:
    cluster = Cluster(tuple(parse_named("far", 1)))
    costs = RooflineCostModel(LLAMA_8B, tensor(["far/cuda:0"]), cluster_profile(cluster), dtype="bf16", kv_dtype="bf16")
    step = costs.stage_ns(0, 0, BatchShape(decode_rows=1, decode_context=1000, sampled_rows=1))
    weights = 2 * (32 * LLAMA_8B.layer_params() + LLAMA_8B.head_params()) / (3350e9 * READ_SHARE)
    assert weights * 1e9 < step < weights * 1e9 + 2e6


def parse_named(host: str, count: int) -> list[Device]:
    return [
        structs.replace(parse_device(f"cuda:{k}"), name=f"{host}/cuda:{k}", host=host, peaks=PUBLISHED["h100_sxm"])
        for k in range(count)
    ]


def test_a_slow_network_makes_tensor_parallelism_across_hosts_slow() -> None:
    names = ["a/cuda:0", "a/cuda:1", "b/cuda:0", "b/cuda:1"]
    cluster = Cluster(tuple(parse_named("a", 2) + parse_named("b", 2)))
    ethernet = Link("*", "*", Seconds(30e-6), 1.25e9)
    shape = BatchShape(prefill_tokens=1000, prefill_pairs=500_000, chunks=1)

    def stage_ns(devices: list[str]) -> int:
        plan, profile = tensor(devices), cluster_profile(cluster)
        return RooflineCostModel(LLAMA_8B, plan, profile, dtype="bf16", links=[ethernet]).stage_ns(0, 0, shape)

    volume = 2 * 3 / 4 * 1000 * 4096 * 2 / 1.25e9 * 1e9 + 2 * 30_000
    collectives = 2 * 32 + 1
    assert stage_ns(names) - collectives * volume < stage_ns(names[:2]) * 1.5
    assert stage_ns(names) > collectives * volume > 10 * stage_ns(names[:2])


def test_profiles_say_where_their_figures_come_from() -> None:
    here, far = parse_device("cpu:0"), parse_named("far", 1)[0]
    assert cluster_profile(Cluster((here,))).source == "default"
    mixed = cluster_profile(Cluster((here, far)))
    assert mixed.source == "published" and {d.kind for d in mixed.devices} == {"cpu", "cuda"}
    assert any("published peaks" in text for text in mixed.missing)
    measured = default_profile([here])
    assert cluster_profile(Cluster((here, far)), measured).device("cpu:0") == measured.device("cpu:0")


def test_a_core_of_this_host_changes_nothing_for_gpus_elsewhere() -> None:
    """Their collectives are not the shared-memory ones that were measured here."""
    far = parse_named("far", 4)
    shape = BatchShape(prefill_tokens=1000, prefill_pairs=500_000, chunks=1)

    def stage_ns(*others: Device) -> int:
        profile = cluster_profile(Cluster((*others, *far)))
        return RooflineCostModel(LLAMA_8B, tensor([d.name for d in far]), profile, dtype="bf16").stage_ns(0, 0, shape)

    assert stage_ns(parse_device("cpu:0"), parse_device("cpu:1")) == stage_ns()
    here = cluster_profile(Cluster((parse_device("cpu:0"), *far)))
    sizes = np.array([65_536.0])
    assert here.collective_ns(2, sizes) == default_profile([parse_device("cpu:0")]).collective_ns(2, sizes)
    assert here.collective_ns(2, sizes, published=True) < 0.2 * here.collective_ns(2, sizes)


def test_a_dtype_without_units_is_refused() -> None:
    old = structs.replace(parse_named("far", 1)[0], peaks=PUBLISHED["t4"])
    with pytest.raises(InvalidInput, match="bf16"):
        RooflineCostModel(LLAMA_8B, tensor(["far/cuda:0"]), cluster_profile(Cluster((old,))), dtype="bf16")
