"""Operations and bytes against counts done by hand."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evener.cost.base import BatchShape
from evener.cost.published import cluster_profile
from evener.cost.rates import DeviceProfile, GemmRates, Profile, Rates, any_kv
from evener.cost.work import PlanWork
from evener.errors import InvalidDevice, InvalidInput
from evener.spec.cluster_text import cluster_from_mapping
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage

TINY = ModelSpec("llama", vocab=1000, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=128, max_position=64)
LAYER = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 128
"""Weights of q, k, v, o and of gate, up, down."""
RATES = Rates((GemmRates("fp32", ((1, 1e9), (64, 8e9), (256, 6e9))),), 5e9, any_kv(1e9, 4e9), 100.0)


def profile(*names: str, slowdown: float = 1.0) -> Profile:
    return Profile(tuple(DeviceProfile(n, "cpu", RATES, RATES, slowdown=slowdown) for n in names), (), "measured")


def whole() -> Plan:
    return Plan((Replica((Stage((0, 3), (Shard("cpu:0", (0, 4), (0, 128), (0, 1000), (0, 1000)),)),)),))


def unequal() -> Plan:
    """3:1 heads and columns in the first stage, one shard in the second."""
    left = Shard("cpu:0", (0, 3), (0, 96), embed_rows=(0, 750))
    right = Shard("cpu:1", (3, 4), (96, 128), embed_rows=(750, 1000))
    last = Shard("cpu:2", (0, 4), (0, 128), head_rows=(0, 1000))
    return Plan((Replica((Stage((0, 2), (left, right)), Stage((2, 3), (last,)))),))


def test_a_decode_step_reads_weights_and_context() -> None:
    work = PlanWork(TINY, whole(), profile("cpu:0"))
    flop, nbytes = work.of(0, 0, 0, BatchShape(decode_rows=2, decode_context=30, sampled_rows=2))
    assert flop == 2 * 2 * 3 * LAYER + 30 * 3 * 4 * 64 + 2 * 2 * 64_000
    kv_of_a_token = 3 * 2 * 32 * 4
    assert nbytes == 4 * (3 * LAYER + 64_000) + (30 + 2) * kv_of_a_token + 2 * 64 * 4


@pytest.mark.parametrize(("start", "count"), [(0, 1), (0, 10), (7, 5), (16, 16)])
def test_a_chunk_reads_all_keys_before_and_in_it_once(start: int, count: int) -> None:
    work = PlanWork(TINY, whole(), profile("cpu:0"), kv_dtype="bf16")
    pairs = count * start + count * (count + 1) // 2
    flop, nbytes = work.of(0, 0, 0, BatchShape(prefill_tokens=count, prefill_pairs=pairs, chunks=1))
    assert flop == 2 * count * 3 * LAYER + pairs * 3 * 4 * 64
    assert nbytes == 4 * 3 * LAYER + (start + 2 * count) * 3 * 2 * 32 * 2 + count * 64 * 4


def test_padding_is_computed_and_an_empty_batch_is_nothing() -> None:
    work = PlanWork(TINY, whole(), profile("cpu:0"))
    assert work.of(0, 0, 0, BatchShape()) == (0, 0)
    padded = work.of(0, 0, 0, BatchShape(decode_rows=1, pad_tokens=4))
    assert padded[0] == 5 * 2 * 3 * LAYER


@given(
    rows=st.integers(0, 50),
    context=st.integers(0, 1000),
    prefill=st.integers(0, 50),
    sampled=st.integers(0, 50),
)
def test_shards_share_the_operations_and_repeat_no_weight(rows: int, context: int, prefill: int, sampled: int) -> None:
    pairs = prefill * (prefill + 1) // 2
    shape = BatchShape(prefill, pairs, rows, context, sampled, 0, min(1, prefill))
    one = PlanWork(TINY, whole(), profile("cpu:0")).of(0, 0, 0, shape)
    work = PlanWork(TINY, unequal(), profile("cpu:0", "cpu:1", "cpu:2"))
    parts = [work.of(0, 0, 0, shape), work.of(0, 0, 1, shape), work.of(0, 1, 0, shape)]
    # Key heads [0, 2) and [1, 2) overlap: the projections of one of them are computed by both.
    doubled = 2 * 64 * 2 * 16
    tokens = prefill + rows
    assert sum(p[0] for p in parts) == one[0] + 2 * doubled * tokens
    keys = 2 * prefill + rows + context
    assert sum(p[1] for p in parts) == one[1] + 4 * (doubled * (tokens > 0) + keys * 2 * 2 * 16)


def test_peak_is_the_best_rate_after_the_declared_slowdown() -> None:
    assert PlanWork(TINY, whole(), profile("cpu:0")).peak("cpu:0") == (8e9, 5e9)
    assert PlanWork(TINY, whole(), profile("cpu:0", slowdown=2.0)).peak("cpu:0") == (4e9, 2.5e9)


def test_published_peaks_are_not_what_is_assumed_to_be_reached() -> None:
    raw = {"hosts": [{"name": "far", "devices": [{"device": "cuda:0", "profile": "h100_sxm", "slowdown": 2}]}]}
    cluster = cluster_from_mapping(raw)
    shard = Shard("far/cuda:0", (0, 4), (0, 128), (0, 1000), (0, 1000))
    plan = Plan((Replica((Stage((0, 3), (shard,)),)),))
    work = PlanWork(TINY, plan, cluster_profile(cluster), dtype="bf16")
    assert work.peak("far/cuda:0") == (989e12 / 2, 3350e9 / 2)


def test_what_is_missing_is_named() -> None:
    with pytest.raises(InvalidInput, match="kv_dtype='fp7'"):
        PlanWork(TINY, whole(), profile("cpu:0"), kv_dtype="fp7")
    with pytest.raises(InvalidInput, match=r"int8.*cpu:0.*fp32"):
        PlanWork(TINY, whole(), profile("cpu:0"), dtype="int8")
    with pytest.raises(InvalidDevice, match="cpu:0"):
        PlanWork(TINY, whole(), profile("cpu:9"))
