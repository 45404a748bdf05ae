"""Devices and traffic mixes as the user writes them."""

import pytest

from evener.errors import InvalidDevice, InvalidTrace
from evener.spec.cluster import Cluster, parse_device, parse_size
from evener.spec.traffic import TrafficMix, parse_traffic_mix


def test_devices_parse() -> None:
    d = parse_device("cpu:2-4#b, slowdown=2.5, memory=1.5GiB")
    assert (d.name, d.kind, d.cores, d.slowdown, d.memory) == ("cpu:2-4#b", "cpu", (2, 3, 4), 2.5, 3 << 29)
    gpu = parse_device("cuda:1")
    assert (gpu.kind, gpu.index, gpu.cores) == ("cuda", 1, ())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("gpu:0", "write cpu:0, cpu:0-7, cuda:0"),
        ("", "not understood"),
        ("cpu:-1", "not understood"),
        ("cpu:3-1", "core range 3-1 runs backwards"),
        ("cuda:0-1", "name one GPU, like cuda:0"),
        ("cpu:0,slowdown=0.5", "slowdown='0.5' must be a number from 1 to 1000"),
        ("cpu:0,slowdown=nan", "must be a number from 1 to 1000"),
        ("cpu:0,slowdown=x", "must be a number from 1 to 1000"),
        ("cpu:0,memory=lots", "memory 'lots' is not a size; write it like 512MiB"),
        ("cpu:0,speed=2", "unknown option 'speed'; options are slowdown=, memory="),
    ],
)
def test_bad_devices_are_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidDevice, match=message):
        parse_device(text)


def test_sizes_and_look_up() -> None:
    assert [parse_size(x) for x in ("7", "2KB", "2 KiB", "0.5MiB")] == [7, 2000, 2048, 1 << 19]
    cluster = Cluster((parse_device("cpu:0"),))
    assert cluster.device("cpu:0").cores == (0,)
    with pytest.raises(InvalidDevice, match=r"'cpu:1' is not in the cluster \(devices: cpu:0\)"):
        cluster.device("cpu:1")


def test_traffic_mix_parses() -> None:
    mix = parse_traffic_mix("in=1000, out=200, rows=8, cached=0.25")
    assert mix == TrafficMix(1000, 200, 8, 0.25)
    assert mix.prefill_tokens_per_output == 3.75
    assert mix.mean_context == 1100
    assert parse_traffic_mix("in=40") == TrafficMix(input_tokens=40)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "'' is not one of in, out, rows, cached"),
        ("in=10,inn=2", "'inn' is not one of"),
        ("in=10,in=20", "in is given twice"),
        ("in=-3", "in='-3' must be a number from 1 to"),
        ("out=0", "out='0' must be a number from 1"),
        ("in", "in='' must be a number"),
        ("in=nan", "must be a number"),
        ("cached=1", "cached='1' must be a number from 0 to 0.999"),
        ("rows=1.5", "must be a whole number"),
    ],
)
def test_bad_traffic_mix_is_refused(text: str, message: str) -> None:
    with pytest.raises(InvalidTrace, match=message):
        parse_traffic_mix(text)
