"""A cost model from operator tables, on tables made up so that the sums can be done by hand."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from evener.cost.base import BatchShape
from evener.cost.rates import Collective
from evener.cost.tables import (
    ATTENTION_EXTRA,
    FFN_EXTRA,
    KERNELS_PER_LAYER,
    AttentionFit,
    GemmGrid,
    MissingTerms,
    OperatorTables,
    TablesCostModel,
    nearest,
)
from evener.errors import InvalidInput
from evener.spec.cluster import Cluster
from evener.spec.cluster_text import cluster_from_mapping
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage, split_even

AXIS = [64, 256, 1024, 4096]
ROWS = [1, 16, 256, 4096]
MODEL = ModelSpec("llama", 4096, 1024, 4, 16, 4, 64, 4096, 8192)
BARE = MissingTerms(host_ns=0, op_ns=1e-9, elementwise_share=1e12, row_ns=0.0)
"""Nothing but the measured operators."""


def grid(per_weight: float = 0.001, per_flop: float = 1e-6) -> GemmGrid:
    """The time is that of reading the weights and of multiplying by them."""
    n, k, m = np.asarray(AXIS)[None, :, None], np.asarray(AXIS)[None, None, :], np.asarray(ROWS)[:, None, None]
    return GemmGrid(ROWS, AXIS, AXIS, (per_weight * n * k + per_flop * n * k * m).astype(np.float64))


def tables(**changes: object) -> OperatorTables:
    made: dict[str, object] = {
        "system": "made-up",
        "source": "test",
        "gemm": {"bf16": grid()},
        "prefill": (AttentionFit(16, 4, 64, 5000.0, 3.0, 0.5, 0.0), AttentionFit(8, 2, 64, 4000.0, 2.0, 0.25, 0.0)),
        "decode": (AttentionFit(16, 4, 64, 7000.0, 0.0, 0.2, 0.0),),
        "collectives": (Collective("measured", 2, ((1024, 1000.0), (1 << 20, 1000.0))),),
    }
    return OperatorTables(**{**made, **changes})  # type: ignore[arg-type]


def cluster(count: int = 1) -> Cluster:
    device = {"device": "cuda:0", "profile": "h100_sxm", "count": count}
    return cluster_from_mapping({"hosts": [{"name": "far", "devices": [device]}]})


def costs(count: int = 1, terms: MissingTerms = BARE, **changes: object) -> TablesCostModel:
    parts = [split_even(n, count) for n in (MODEL.heads, MODEL.ffn, MODEL.vocab, MODEL.vocab)]
    devices = cluster(count).devices
    shards = tuple(Shard(d.name, *cut) for d, *cut in zip(devices, *parts, strict=True))
    plan = Plan((Replica((Stage((0, MODEL.layers), shards),)),))
    return TablesCostModel(MODEL, plan, cluster(count), {d.name: tables(**changes) for d in devices}, terms=terms)


def gemm(rows: int, n: int, k: int) -> float:
    return n * k * (0.001 + 1e-6 * rows)


def test_a_decode_step_is_the_sum_of_its_operators() -> None:
    shape = BatchShape(decode_rows=16, decode_context=1000, sampled_rows=16)
    layer = gemm(16, 1536, 1024) + gemm(16, 1024, 1024) + gemm(16, 8192, 1024) + gemm(16, 1024, 4096)
    attention = 5000 + 3 * 16 + 0.2 * 1000
    expected = 4 * (layer + attention) + gemm(16, 4096, 1024)
    assert costs().stage_ns(0, 0, shape) == pytest.approx(expected, rel=1e-3)


def test_two_devices_share_a_layer_and_meet_twice() -> None:
    shape = BatchShape(prefill_tokens=256, prefill_pairs=256 * 257 // 2, chunks=1)
    layer = gemm(256, 768, 1024) + gemm(256, 1024, 512) + gemm(256, 4096, 1024) + gemm(256, 1024, 2048)
    attention = 4000 + 2 * 256 + 0.25 * 256 * 257 / 2
    expected = 4 * (layer + attention + 2 * 1000) + 1000
    assert costs(2).stage_ns(0, 0, shape) == pytest.approx(expected, rel=1e-3)


def test_slower_all_reduces_multiply_what_size_costs() -> None:
    shape = BatchShape(prefill_tokens=256, prefill_pairs=256 * 257 // 2, chunks=1)
    line = (Collective("measured", 2, ((1024, 1000.0), (1 << 30, 1000.0 + (1 << 30) - 1024))),)
    usual = costs(2, collectives=line).stage_ns(0, 0, shape)
    slow = costs(2, structs.replace(BARE, moving_factor=3.0), collectives=line).stage_ns(0, 0, shape)
    nbytes = 256 * 1024 * 2 - 1024
    assert slow - usual == pytest.approx(9 * 2 * nbytes, rel=0.01)


@given(n=st.integers(64, 9000), k=st.integers(64, 9000), rows=st.integers(1, 9000))
def test_gemm_times_between_and_past_the_points(n: int, k: int, rows: int) -> None:
    got = float(grid().ns(np.array([rows]), n, k)[0])
    assert got == pytest.approx(gemm(rows, n, k), rel=0.3)
    assert grid().ns(np.array([rows + 100]), n, k)[0] >= got


def test_a_larger_matrix_never_takes_less_and_nothing_takes_nothing() -> None:
    times = grid().ns(np.arange(5000), 512, 512)
    assert times[0] == 0 and (np.diff(times) >= 0).all()
    assert grid().ns(np.array([5]), 0, 512)[0] == 0


def test_a_host_that_starts_every_kernel_bounds_a_layer() -> None:
    slow = MissingTerms(host_ns=0, launch_ns=50_000.0, row_ns=0.0)
    shape = BatchShape(decode_rows=1, decode_context=10)
    assert costs(terms=slow).stage_ns(0, 0, shape) == pytest.approx(4 * KERNELS_PER_LAYER * 50_000, rel=0.01)
    large = BatchShape(prefill_tokens=4096, prefill_pairs=4096 * 4097 // 2, chunks=1)
    for model in (costs(terms=slow), costs(2, terms=slow)):
        assert all(sum(t) == model.stage_ns(0, 0, shape) for t in model.shards_ns(0, 0, shape))
        assert model.batch_ns(0, shape) == model.latency_ns(0, shape) == model.stage_ns(0, 0, shape)
        run = model.decode_run(0, 0, 1, 10, 3)
        steps = [BatchShape(decode_rows=1, decode_context=10 + k, sampled_rows=1) for k in range(3)]
        assert [run.host + b for b in run.busy] == [model.stage_ns(0, 0, s) for s in steps]
    quick = MissingTerms(host_ns=0, launch_ns=1_000.0)
    assert costs(terms=quick).stage_ns(0, 0, large) == costs(terms=MissingTerms(host_ns=0)).stage_ns(0, 0, large)


def test_missing_terms_add_what_they_say() -> None:
    shape = BatchShape(decode_rows=8, decode_context=100, sampled_rows=8)
    base = costs().stage_ns(0, 0, shape)
    more = MissingTerms(host_ns=1_000_000, op_ns=1e-9, elementwise_share=1e12, row_ns=500.0)
    assert costs(terms=more).stage_ns(0, 0, shape) - base == pytest.approx(1_000_000 + 8 * 500, abs=5)
    ops = MissingTerms(host_ns=0, op_ns=10_000.0, elementwise_share=1e12, row_ns=0.0)
    added = 4 * (ATTENTION_EXTRA + FFN_EXTRA) + 4 + 2
    assert costs(terms=ops).stage_ns(0, 0, shape) - base == pytest.approx(added * 10_000, rel=0.01)


@given(st.tuples(*[st.integers(0, 3000) for _ in range(4)]), st.tuples(*[st.integers(0, 500) for _ in range(4)]))
def test_more_work_never_takes_less(base: tuple[int, ...], more: tuple[int, ...]) -> None:
    def shape(v: tuple[int, ...]) -> BatchShape:
        return BatchShape(v[0], v[1], v[2], v[3], v[2], 0, 0)

    model = COSTS
    assert model.stage_ns(0, 0, shape(base)) <= model.stage_ns(
        0, 0, shape(tuple(a + b for a, b in zip(base, more, strict=True)))
    )


COSTS = costs(2, terms=MissingTerms())


def test_the_most_alike_shape_is_scaled() -> None:
    fits = tables().prefill
    assert nearest(fits, 16, 4, 64, "prefill").unit_ns == 0.5
    assert nearest(fits, 32, 8, 64, "prefill").unit_ns == pytest.approx(1.0)
    assert nearest(fits, 16, 4, 128, "prefill").unit_ns == pytest.approx(1.0)
    assert nearest(tables().decode, 16, 8, 64, "decode").unit_ns == pytest.approx(0.4)
    with pytest.raises(InvalidInput, match="no prefill attention"):
        nearest((), 16, 4, 64, "prefill")


def test_what_was_not_measured_is_refused() -> None:
    devices = cluster().devices
    shard = Shard(devices[0].name, (0, 16), (0, 4096), (0, 4096), (0, 4096))
    plan = Plan((Replica((Stage((0, 4), (shard,)),)),))
    with pytest.raises(InvalidInput, match=r"no measured GEMM in 'fp8' \(measured: bf16\)"):
        TablesCostModel(MODEL, plan, cluster(), {devices[0].name: tables()}, dtype="fp8")
    with pytest.raises(InvalidInput, match="far/cuda:0 has no operator tables"):
        TablesCostModel(MODEL, plan, cluster(), {})
