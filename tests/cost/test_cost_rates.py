"""Rates: interpolation, the memory roof, noise, and what is refused when read."""

import msgspec
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener.cost.rates import (
    COLD,
    AttentionRates,
    Collective,
    GemmRates,
    Profile,
    Rates,
    any_kv,
    bind,
    default_profile,
)
from evener.errors import InvalidDevice, InvalidInput
from evener.spec.cluster import parse_device
from evener.spec.model import DTYPE_BYTES


def rates(*points: tuple[int, float], read: float = 1e30) -> Rates:
    return Rates((GemmRates("fp32", points),), read, any_kv(1e9, 1e9), 1.0)


def test_attention_is_told_apart_by_the_dtype_of_the_cache() -> None:
    r = structs.replace(rates((1, 1e9)), attention=(AttentionRates("fp32", 1e9, 2e9), AttentionRates("int8", 3e9, 4e9)))
    assert (r.attention_over("int8").flops, r.attention_over("fp32").bandwidth) == (3e9, 2e9)
    with pytest.raises(InvalidInput, match=r"no attention rate for kv_dtype 'bf16'.*\(measured: fp32, int8\)"):
        r.attention_over("bf16")
    with pytest.raises(ValueError, match="decode attention over int8 is 0"):
        AttentionRates("int8", 1e9, 0)


def test_gemm_between_and_beyond_measured_rows() -> None:
    r = rates((1, 1e9), (4, 2e9), (16, 2e9))
    got = r.gemm_ns("fp32", np.array([0, 1, 2, 4, 10, 16, 32]))
    assert got.tolist() == pytest.approx([0, 2, 2 + 2 / 3, 4, 10, 16, 32])


def test_gemm_is_never_below_one_reading_of_the_weights() -> None:
    assert rates((1, 1e12), (64, 1e12), read=2e9).gemm_ns("fp32", np.array([1, 10])).tolist() == pytest.approx([2, 2])


def test_noise_on_a_small_size_does_not_raise_the_larger_ones() -> None:
    noisy = Collective("shm", 2, ((1024, 900.0), (2048, 20.0), (4096, 40.0)))
    assert noisy.ns(np.array([1024.0, 2048.0, 3072.0, 8192.0])).tolist() == [20, 20, 30, 80]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(1e6, 1e12), min_size=1, max_size=6), st.floats(1e6, 1e12))
def test_gemm_never_falls(measured: list[float], read: float) -> None:
    points = tuple((4**k, rate) for k, rate in enumerate(measured))
    cost = rates(*points, read=read).gemm_ns("fp32", np.arange(3 * 4 ** len(points)))
    assert np.all(np.diff(cost) >= -1e-9 * cost[1:])


@pytest.mark.parametrize(
    "bad",
    [
        {"points": ()},
        {"points": ((0, 1.0),)},
        {"points": ((4, 1.0), (1, 1.0))},
        {"points": ((1, 0.0),)},
        {"points": ((1, float("nan")),)},
    ],
)
def test_bad_gemm_tables_are_refused(bad: dict[str, tuple[tuple[int, float], ...]]) -> None:
    with pytest.raises(ValueError, match="gemm fp32"):
        GemmRates("fp32", **bad)


def test_a_profile_survives_json_and_refuses_impossible_figures() -> None:
    profile = default_profile([parse_device("cpu:0"), parse_device("cuda:0")])
    data = msgspec.json.encode(profile)
    assert msgspec.json.decode(data, type=Profile) == profile
    assert profile.source == "default" and "assumed" in profile.missing[0]
    broken = data.replace(b'"op_ns":3000.0', b'"op_ns":-1')
    assert broken != data
    with pytest.raises(msgspec.ValidationError, match="op_ns is -1"):
        msgspec.json.decode(broken, type=Profile)


def test_assumed_rates_respect_the_memory_roof() -> None:
    for d in default_profile([parse_device("cpu:0"), parse_device("cpu:0-7"), parse_device("cuda:0")]).devices:
        for table in d.alone.gemm:
            for rows, rate in table.points:
                assert rate * DTYPE_BYTES[table.dtype] <= 2 * rows * d.alone.read_bandwidth * (1 + 1e-9)


@pytest.mark.parametrize(
    ("workers", "crowding"),
    [
        (("cpu:0", "cpu:0#1"), (2.0, 2.0)),
        (("cpu:0", "cpu:0#1", "cpu:0#2"), (3.0, 3.0, 3.0)),
        (("cpu:0,slowdown=2", "cpu:0#1,slowdown=4"), (1.0, 1.0)),  # 1/2 and 1/4 of the core
        (("cpu:0,slowdown=2", "cpu:0#1,slowdown=2"), (1.0, 1.0)),
        (("cpu:0", "cpu:0#1,slowdown=2"), (2.0, 1.0)),  # each gets the half that the second asks for
        (("cpu:0", "cpu:0#1,slowdown=4"), (4 / 3, 1.0)),
        (("cpu:0", "cpu:1,slowdown=4"), (1.0, 1.0)),
    ],
)
def test_workers_on_one_core_crowd_each_other_as_far_as_they_ask_for_more_than_there_is(
    workers: tuple[str, ...], crowding: tuple[float, ...]
) -> None:
    hardware = [parse_device("cpu:0"), parse_device("cpu:1")]
    profile = bind(default_profile(hardware), [parse_device(x) for x in workers])
    assert [d.crowding for d in profile.devices] == pytest.approx(crowding)
    asked = sum(1 / d.slowdown / d.crowding for d in profile.devices if d.hardware == "cpu:0")
    assert asked <= 1 + 1e-9
    for d in profile.devices:
        cold = COLD if d.sharers > 1 and d.slowdown > 1 else 1.0
        assert d.stretch(alone=False) == pytest.approx(d.slowdown * d.crowding * cold)
        assert d.stretch(alone=True) == d.slowdown
        assert d.lost(alone=False) == pytest.approx(1 - 1 / d.crowding)


def test_bind_names_workers_slowdowns_and_sharers() -> None:
    workers = [parse_device(x) for x in ("cpu:0,slowdown=2", "cpu:0#1", "cpu:1", "cpu:0-1#wide")]
    profile = bind(default_profile([parse_device(x) for x in ("cpu:0", "cpu:1", "cpu:0-1")]), workers)
    assert [(d.name, d.hardware, d.slowdown, d.sharers) for d in profile.devices] == [
        ("cpu:0", "cpu:0", 2.0, 3),
        ("cpu:0#1", "cpu:0", 1.0, 3),
        ("cpu:1", "cpu:1", 1.0, 2),
        ("cpu:0-1#wide", "cpu:0-1", 1.0, 3),
    ]
    assert bind(profile, workers) == profile
    with pytest.raises(
        InvalidDevice, match=r"cpu:7 is not in the profile \(has: cpu:0, .*evener devices --devices cpu:7"
    ):
        bind(profile, [parse_device("cpu:7#2")])
