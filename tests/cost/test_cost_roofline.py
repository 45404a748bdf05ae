"""The roofline model against sums done by hand, and its laws."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener.cost.base import BatchShape, CostModel
from evener.cost.device import ATTENTION_OPS, CHUNK_OPS, EMBED_OPS, FFN_OPS, HEAD_OPS
from evener.cost.rates import LATE, Collective, DeviceProfile, GemmRates, Profile, Rates, any_kv, bind, default_profile
from evener.cost.roofline import RooflineCostModel, waiting_on_one_core
from evener.cost.stage import MAX_ROWS
from evener.errors import InvalidDevice, InvalidInput
from evener.spec.cluster import Link, parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage, split_even
from evener.units import Seconds

TINY = ModelSpec("llama", vocab=1000, hidden=64, layers=3, heads=4, kv_heads=2, head_dim=16, ffn=128, max_position=64)
SMOL = ModelSpec("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, tied=True)
HUGE = 1e30
"""A rate so high that its term vanishes."""


def rates(gemm: float = HUGE, read: float = HUGE, flops: float = HUGE, kv: float = HUGE, op_ns: float = 1e-9) -> Rates:
    return Rates((GemmRates("fp32", ((1, gemm), (256, gemm))),), read, any_kv(flops, kv), op_ns)


def profile(*each: Rates, collective: tuple[tuple[int, float], ...] = (), host_ns: int = 0) -> Profile:
    devices = tuple(DeviceProfile(f"cpu:{k}", "cpu", r, r) for k, r in enumerate(each))
    collectives = (Collective("test", 2, collective),) if collective else ()
    return Profile(devices, collectives, "measured", host_ns=host_ns)


def whole(model: ModelSpec, device: str = "cpu:0") -> Plan:
    shard = Shard(device, (0, model.heads), (0, model.ffn), (0, model.vocab), (0, model.vocab))
    return Plan((Replica((Stage((0, model.layers), (shard,)),)),))


def halves(model: ModelSpec, heads: int, ffn: int) -> Plan:
    vocab = model.vocab // 2
    left = Shard("cpu:0", (0, heads), (0, ffn), (0, vocab), (0, vocab))
    right = Shard("cpu:1", (heads, model.heads), (ffn, model.ffn), (vocab, model.vocab), (vocab, model.vocab))
    return Plan((Replica((Stage((0, model.layers), (left, right)),)),))


def piped(model: ModelSpec, cut: int) -> Plan:
    first = Shard("cpu:0", (0, model.heads), (0, model.ffn), embed_rows=(0, model.vocab))
    second = Shard("cpu:1", (0, model.heads), (0, model.ffn), head_rows=(0, model.vocab))
    return Plan((Replica((Stage((0, cut), (first,)), Stage((cut, model.layers), (second,)))),))


def test_gemm_time_is_weights_over_rate() -> None:
    costs = RooflineCostModel(TINY, whole(TINY), profile(rates(gemm=1e9)))
    layer = TINY.layer_params() - 2 * TINY.hidden  # norms are no GEMM
    assert costs.stage_ns(0, 0, BatchShape(prefill_tokens=10)) == 2 * 10 * 3 * layer
    assert costs.stage_ns(0, 0, BatchShape(decode_rows=4, prefill_tokens=3, pad_tokens=3)) == 2 * 10 * 3 * layer
    assert costs.stage_ns(0, 0, BatchShape(sampled_rows=5)) == 2 * 5 * TINY.head_params()


def test_one_row_costs_at_least_reading_the_weights() -> None:
    costs = RooflineCostModel(TINY, whole(TINY), profile(rates(read=1e9)))
    layer = TINY.layer_params() - 2 * TINY.hidden
    got = costs.stage_ns(0, 0, BatchShape(prefill_tokens=1))
    elementwise = 3 * 4 * ((4 * 64 + 16 * (8 + 4)) + (4 * 64 + 3 * 128))
    embedding = 2 * 64 * 4
    assert got == pytest.approx(3 * layer * 4 + elementwise + embedding, abs=4)


def test_attention_by_pairs_and_by_keys() -> None:
    costs = RooflineCostModel(TINY, whole(TINY), profile(rates(flops=1e9, kv=0.25e9)))
    assert costs.stage_ns(0, 0, BatchShape(prefill_pairs=100)) == 3 * 100 * 4 * 4 * 16
    by_bytes = 3 * 2 * 2 * 16 * 4 * 4  # layers, K and V, KV heads, head_dim, fp32, nanoseconds per byte
    by_flop = 3 * 4 * 4 * 16
    assert by_bytes > by_flop
    assert costs.stage_ns(0, 0, BatchShape(decode_context=100)) == 100 * by_bytes
    slow_maths = RooflineCostModel(TINY, whole(TINY), profile(rates(flops=1e9)))
    assert slow_maths.stage_ns(0, 0, BatchShape(decode_context=100)) == 100 * by_flop


def test_operators_chunks_and_host() -> None:
    costs = RooflineCostModel(TINY, whole(TINY), profile(rates(op_ns=10.0), host_ns=7))
    per_batch = 10 * (3 * (ATTENTION_OPS + FFN_OPS) + EMBED_OPS) + 7
    assert costs.stage_ns(0, 0, BatchShape(prefill_tokens=1)) == per_batch
    assert costs.stage_ns(0, 0, BatchShape(prefill_tokens=1, sampled_rows=1, chunks=3)) == (
        per_batch + 10 * HEAD_OPS + 3 * 10 * CHUNK_OPS
    )


def test_each_phase_waits_for_its_own_slowest_shard() -> None:
    plan = halves(TINY, heads=3, ffn=32)
    got = RooflineCostModel(TINY, plan, profile(rates(gemm=1e9), rates(gemm=1e9))).stage_ns
    attention = 64 * 16 * (2 * 3 + 2 * 2)  # cpu:0 owns three query heads, which read both KV heads
    ffn = 3 * 64 * 96  # and cpu:1 most of the columns
    assert got(0, 0, BatchShape(prefill_tokens=5)) == 2 * 5 * 3 * (attention + ffn)
    slow = RooflineCostModel(TINY, plan, profile(rates(gemm=0.1e9), rates(gemm=1e9))).stage_ns
    assert slow(0, 0, BatchShape(prefill_tokens=5)) == 2 * 5 * 3 * 10 * (attention + 3 * 64 * 32)


def test_collectives_by_size() -> None:
    message = 64 * 4  # one row of activations
    table = ((message, 100.0), (3 * message, 300.0))
    costs = RooflineCostModel(TINY, halves(TINY, 2, 64), profile(rates(), rates(), collective=table))
    for rows, each in ((1, 100), (2, 200), (3, 300), (10, 1000)):
        assert costs.stage_ns(0, 0, BatchShape(prefill_tokens=rows)) == (2 * 3 + 1) * each, (
            "per layer two, one embedding"
        )
    assert RooflineCostModel(TINY, whole(TINY), profile(rates(), collective=table)).stage_ns(
        0, 0, BatchShape(prefill_tokens=3)
    ) == 0, "one rank has no collective"  # fmt: skip


def test_unmeasured_rank_counts_scale() -> None:
    p = structs.replace(
        profile(rates()), collectives=(Collective("t", 2, ((8, 10.0),)), Collective("t", 4, ((8, 50.0),)))
    )
    at = np.array([8.0])
    assert [float(p.collective_ns(n, at)[0]) for n in (1, 2, 3, 4, 7)] == [0, 10, 20, 50, 100]


def test_stages_add_up_in_latency_and_the_slowest_rules_a_full_pipe() -> None:
    plan = piped(TINY, cut=1)
    shape = BatchShape(prefill_tokens=8, sampled_rows=2)
    costs = RooflineCostModel(TINY, plan, profile(rates(gemm=1e9), rates(gemm=1e9)))
    one, two = costs.stage_ns(0, 0, shape), costs.stage_ns(0, 1, shape)
    layer = 2 * 8 * (TINY.layer_params() - 2 * TINY.hidden)
    assert (one, two) == (layer, 2 * layer + 2 * 2 * TINY.head_params())
    assert costs.batch_ns(0, shape) == max(one, two)
    assert costs.latency_ns(0, shape) == one + two


def test_declared_links_slow_collectives_and_pipes() -> None:
    link = [Link("cpu:1", "cpu:0", delay=Seconds(1e-3), bandwidth=1e6)]
    shape = BatchShape(prefill_tokens=2)
    message = 2 * 64 * 4
    grouped = RooflineCostModel(TINY, halves(TINY, 2, 64), profile(rates(), rates()), links=link)
    assert grouped.stage_ns(0, 0, shape) == (2 * 3 + 1) * (1_000_000 + message * 1000)
    pipe = RooflineCostModel(TINY, piped(TINY, 1), profile(rates(), rates()), links=link)
    assert pipe.stage_ns(0, 0, shape) == message * 1000, "a delay keeps the message, not the sender"
    assert pipe.stage_ns(0, 1, shape) == 0
    assert pipe.latency_ns(0, shape) == message * 1000 + 1_000_000


def test_slowdown_and_shared_cores_stretch_compute() -> None:
    shape = BatchShape(prefill_tokens=8, prefill_pairs=36, decode_context=50, sampled_rows=2)
    measured = profile(rates(1e9, 1e9, 1e9, 1e9, 100.0))
    base = RooflineCostModel(TINY, whole(TINY), bind(measured, [parse_device("cpu:0")])).batch_ns(0, shape)
    slow = RooflineCostModel(TINY, whole(TINY), bind(measured, [parse_device("cpu:0,slowdown=3")])).batch_ns(0, shape)
    assert slow == pytest.approx(3 * base, abs=8)
    both = [parse_device("cpu:0"), parse_device("cpu:0#1")]
    plan = Plan(whole(TINY).replicas + whole(TINY, "cpu:0#1").replicas)
    shared = RooflineCostModel(TINY, plan, bind(measured, both))
    assert shared.batch_ns(1, shape) == shared.batch_ns(0, shape) == pytest.approx(2 * base, abs=8)


def test_together_rates_hold_for_several_devices() -> None:
    fast, slow = rates(gemm=2e9), rates(gemm=1e9)
    p = Profile(tuple(DeviceProfile(f"cpu:{k}", "cpu", fast, slow) for k in range(2)), (), "measured")
    shape = BatchShape(prefill_tokens=8)
    alone = RooflineCostModel(TINY, whole(TINY), p).batch_ns(0, shape)
    replicas = Plan(whole(TINY).replicas + whole(TINY, "cpu:1").replicas)
    assert RooflineCostModel(TINY, replicas, p).batch_ns(0, shape) == pytest.approx(2 * alone, abs=8 + p.host_ns)


def test_unknown_device_and_dtype_are_refused() -> None:
    with pytest.raises(InvalidDevice, match=r"'cpu:3' is not in the profile .*evener devices"):
        RooflineCostModel(TINY, whole(TINY, "cpu:3"), profile(rates()))
    with pytest.raises(InvalidInput, match=r"dtype 'bf16' in the profile \(measured: fp32\)"):
        RooflineCostModel(TINY, whole(TINY), profile(rates()), dtype="bf16")
    with pytest.raises(InvalidInput, match="kv_dtype='fp7' is not one of"):
        RooflineCostModel(TINY, whole(TINY), profile(rates()), kv_dtype="fp7")


def test_it_is_a_cost_model() -> None:
    costs: CostModel = RooflineCostModel(TINY, whole(TINY), profile(rates()), version=4, measured_error=0.1)
    assert (costs.version, costs.error()) == (4, 0.1)
    assert RooflineCostModel(TINY, whole(TINY), profile(rates())).error() is None


DEVICES = [parse_device(x) for x in ("cpu:0", "cpu:1,slowdown=2")]
MODELS = [
    RooflineCostModel(SMOL, halves(SMOL, 6, 1024), default_profile(DEVICES)),
    RooflineCostModel(SMOL, piped(SMOL, 11), default_profile(DEVICES)),
]
COUNTS = {
    "prefill_tokens": 2 * MAX_ROWS, "prefill_pairs": 10**8, "decode_rows": 2000, "decode_context": 10**7,
    "sampled_rows": 2 * MAX_ROWS, "pad_tokens": 5000, "chunks": 100,
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    st.fixed_dictionaries({k: st.integers(0, most) for k, most in COUNTS.items()}),
    st.sampled_from(sorted(COUNTS)),
    st.one_of(st.just(1), st.integers(1, 5000)),
)
def test_monotone_in_every_field(counts: dict[str, int], field: str, more: int) -> None:
    small, large = BatchShape(**counts), BatchShape(**{**counts, field: counts[field] + more})
    for costs in MODELS:
        for predict in (costs.batch_ns, costs.latency_ns):
            a, b = predict(0, small), predict(0, large)
            assert type(a) is int and 0 <= a <= b


def test_an_empty_shape_costs_nothing() -> None:
    for costs in MODELS:
        assert costs.batch_ns(0, BatchShape()) == costs.latency_ns(0, BatchShape()) == 0


def test_slowed_workers_of_one_replica_on_one_core_wait_for_each_other() -> None:
    """As replicas they use each other's pauses; in one replica every sum finds the other asleep or at work."""
    devices = [parse_device(t) for t in ("cpu:0,slowdown=2", "cpu:0#1,slowdown=4", "cpu:1,slowdown=2")]
    known = default_profile(devices)
    shape = BatchShape(decode_rows=8, decode_context=800, sampled_rows=8)

    def busy_ns(*names: str) -> int:
        parts = [split_even(n, len(names)) for n in (SMOL.heads, SMOL.ffn, SMOL.vocab, SMOL.vocab)]
        shards = tuple(Shard(n, *cut) for n, *cut in zip(names, *parts, strict=True))
        costs = RooflineCostModel(SMOL, Plan((Replica((Stage((0, 30), shards),)),)), known)
        return max(t.compute for t in costs.shards_ns(0, 0, shape))

    apart, shared = busy_ns("cpu:1", "cpu:0#1"), busy_ns("cpu:0", "cpu:0#1")
    assert shared == pytest.approx(LATE * apart, rel=0.01)


def test_a_device_that_a_trial_plan_names_twice_does_not_wait_for_itself() -> None:
    """The search prices stages in plans that repeat devices, over two replicas and within one."""
    devices = [parse_device("cpu:0,slowdown=2"), parse_device("cpu:1,slowdown=2"), parse_device("cpu:1#1,slowdown=2")]
    known = default_profile(devices)

    def stages(*names: str) -> Replica:
        return Replica(tuple(Stage((k, k + 1), (Shard(n, (0, 9), (0, 1536)),)) for k, n in enumerate(names)))

    twice = Plan((stages("cpu:0", "cpu:0"), stages("cpu:0", "cpu:0")))
    assert waiting_on_one_core(twice, known) == set()
    assert waiting_on_one_core(Plan((stages("cpu:1"), stages("cpu:1#1"))), known) == set()
    both = Plan((stages("cpu:1", "cpu:1#1"), stages("cpu:1", "cpu:1#1")))
    assert waiting_on_one_core(both, known) == {"cpu:1", "cpu:1#1"}
    once = RooflineCostModel(SMOL, Plan(both.replicas[:1]), known)
    shape = BatchShape(decode_rows=8, decode_context=800, sampled_rows=8)
    assert RooflineCostModel(SMOL, both, known).stage_ns(1, 0, shape) == once.stage_ns(0, 0, shape)
