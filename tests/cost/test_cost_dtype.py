"""`--dtype auto`: what was measured decides."""

import pytest
from msgspec import structs

from evener.cost.dtype import fastest_dtype
from evener.cost.rates import GemmRates, Profile, default_profile
from evener.errors import InvalidInput
from evener.spec.cluster import parse_device
from evener.spec.traffic import TrafficMix

DTYPES = ("fp32", "bf16", "int8")


def measured(**gflops: tuple[float, float]) -> Profile:
    """One device with (rate at 1 row, rate at 256 rows) per dtype."""
    [device] = default_profile([parse_device("cpu:0")]).devices
    gemm = tuple(GemmRates(t, ((1, a * 1e9), (256, b * 1e9))) for t, (a, b) in gflops.items())
    rates = structs.replace(device.alone, gemm=gemm, read_bandwidth=1e15)
    return Profile((structs.replace(device, alone=rates, together=rates),), (), "measured")


def test_the_fastest_as_measured() -> None:
    mix = TrafficMix(512, 128)
    assert fastest_dtype(measured(fp32=(5, 50), bf16=(4, 40), int8=(20, 100)), DTYPES, mix) == "int8"
    assert fastest_dtype(measured(fp32=(5, 50), bf16=(4, 40), int8=(4, 40)), DTYPES, mix) == "fp32"
    assert fastest_dtype(measured(fp32=(5, 50), bf16=(5, 50)), DTYPES, mix) == "fp32", "equals: the first named"


def test_traffic_decides_between_prompts_and_outputs() -> None:
    profile = measured(fp32=(5, 100), int8=(50, 60))
    assert fastest_dtype(profile, DTYPES, TrafficMix(10_000, 1, decode_rows=1)) == "fp32"
    assert fastest_dtype(profile, DTYPES, TrafficMix(1, 10_000, decode_rows=1)) == "int8"


def test_assumed_rates_do_not_choose() -> None:
    with pytest.raises(InvalidInput, match=r"were not measured; run `evener devices`, or name one of fp32, bf16, int8"):
        fastest_dtype(default_profile([parse_device("cpu:0")]), DTYPES, TrafficMix())


def test_a_dtype_nobody_measured() -> None:
    with pytest.raises(InvalidInput, match="none of int8 was measured on all devices"):
        fastest_dtype(measured(fp32=(5, 50)), ("int8",), TrafficMix())
