"""Several measurements of the same devices: the best of every figure is kept."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener.cost.rates import Collective, DeviceProfile, GemmRates, Profile, Rates, default_profile
from evener.profile.quiet import quietest
from evener.spec.cluster import parse_device


def disturbed(profile: Profile, rng: random.Random) -> Profile:
    """Each figure up to three times as slow."""

    def rates(r: Rates) -> Rates:
        gemm = tuple(GemmRates(g.dtype, tuple((n, x / rng.uniform(1, 3)) for n, x in g.points)) for g in r.gemm)
        attention = tuple(
            structs.replace(a, flops=a.flops / rng.uniform(1, 3), bandwidth=a.bandwidth / rng.uniform(1, 3))
            for a in r.attention
        )
        slow = rng.uniform(1, 3)
        return structs.replace(
            r, gemm=gemm, attention=attention, read_bandwidth=r.read_bandwidth / slow, op_ns=r.op_ns * slow
        )

    def device(d: DeviceProfile) -> DeviceProfile:
        return structs.replace(d, alone=rates(d.alone), together=rates(d.together))

    def collective(c: Collective) -> Collective:
        return structs.replace(c, points=tuple((b, ns * rng.uniform(1, 3)) for b, ns in c.points))

    devices, collectives = map(device, profile.devices), map(collective, profile.collectives)
    return structs.replace(profile, devices=tuple(devices), collectives=tuple(collectives))


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 1000), st.integers(1, 4))
def test_the_quiet_figures_come_through(seed: int, times: int) -> None:
    """Of disturbed measurements and an undisturbed one this is left; and no figure is worse than in any of them."""
    true = default_profile([parse_device("cpu:0"), parse_device("cpu:1")])
    rng = random.Random(seed)
    noisy = [disturbed(true, rng) for _ in range(times)]
    at = rng.randrange(times + 1)
    assert quietest([*noisy[:at], true, *noisy[at:]]) == true
    best = quietest(noisy)
    for one in noisy:
        for mine, its in zip(best.devices, one.devices, strict=True):
            assert all(
                a >= b
                for g, h in zip(mine.alone.gemm, its.alone.gemm, strict=True)
                for (_, a), (_, b) in zip(g.points, h.points, strict=True)
            )
            assert mine.together.op_ns <= its.together.op_ns


def test_what_one_measurement_lacks_the_others_have() -> None:
    true = default_profile([parse_device("cpu:0")])
    (device,) = true.devices
    fewer = structs.replace(device.alone, gemm=device.alone.gemm[:1], attention=device.alone.attention[:1])
    part = structs.replace(true, devices=(structs.replace(device, alone=fewer),))
    assert quietest([part, true]) == true
    assert quietest([true, part]) == part, "the last one says what there is"
    alone = structs.replace(true, collectives=(structs.replace(true.collectives[0], transport="shm"),))
    assert quietest([true, alone]) == alone, "collectives of another transport say nothing of these"
    assert quietest([true]).devices[0].alone.read_bandwidth == pytest.approx(device.alone.read_bandwidth)
