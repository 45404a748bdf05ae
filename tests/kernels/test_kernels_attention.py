"""Paged attention: equal to the reference, and bit for bit independent of everything but its own sequence."""

import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import Paged, paged

from evener import kernels

heads = st.sampled_from([[0], [0, 0, 0, 1, 1], [0, 1, 0, 1], [0] * 7, [0] * 50, [0, 0, 1, 1, 2, 2]])
chunk = st.tuples(st.integers(0, 150), st.one_of(st.just(1), st.integers(1, 90)))
kv_dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
use_fixture = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@use_fixture
@given(
    chunks=st.lists(chunk, min_size=1, max_size=4),
    kv_of_head=heads,
    dim=st.sampled_from([16, 48, 64, 80, 128]),
    padding=st.integers(0, 3),
    seed=st.integers(0, 99),
    dtype=kv_dtypes,
)
def test_equals_reference(
    isa: str,
    chunks: list[tuple[int, int]],
    kv_of_head: list[int],
    dim: int,
    padding: int,
    seed: int,
    dtype: torch.dtype,
) -> None:
    case = paged(chunks, kv_of_head, dim, padding, seed).narrowed(dtype)
    # With VNNI, queries and weights over int8 are rounded to 16 bits.
    near = 5e-4 if dtype is torch.int8 and isa in ("avx512vnni", "avx512bf16", "avx512amx") else 1e-5
    torch.testing.assert_close(case.run(), case.reference(), rtol=near, atol=near)


@use_fixture
@given(
    chunks=st.lists(chunk, min_size=1, max_size=4), kv_of_head=heads, dim=st.sampled_from([64, 128, 192, 96]),
    seed=st.integers(0, 99), size=st.sampled_from([0.01, 1.0, 30.0]),
)  # fmt: skip
def test_int8_by_tiles_gives_the_same_bits(
    isa: str, chunks: list[tuple[int, int]], kv_of_head: list[int], dim: int, seed: int, size: float
) -> None:
    """Tile registers hold the same integers, and what follows is done in the same order."""
    if isa != "avx512amx":
        return
    case = paged(chunks, kv_of_head, dim, 0, seed).narrowed(torch.int8)
    case.q_TQD[:] *= size
    by_tiles = case.run()
    kernels.set_isa("avx512bf16")
    without = case.run()
    kernels.set_isa(isa)
    assert torch.equal(by_tiles, without)


@pytest.mark.parametrize("dim", [256, 512, 528])
def test_wide_heads_over_int8(isa: str, dim: int) -> None:
    """Sums of integers that would not fit 32 bits are not taken."""
    case = paged([(30, 20)], [0], dim).narrowed(torch.int8)
    case.q_TQD[:] = 3.0
    case.k_slab[..., : 16 * dim] = 127
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-3, atol=1e-3)


def test_small_weights_count_over_int8(isa: str) -> None:
    """An attention sink: one early key takes most of the weight and has no value, the rest is all there is to see."""
    keys = 1000
    case = paged([(keys - 1, 1)], [0], 64)
    for slab in (case.k_slab, case.v_slab):
        slab.nan_to_num_()
    case.q_TQD[:], case.scale = 1.0, 1.0
    case.k_slab[:], case.v_slab[:] = 0.0, 1.0
    first = int(case.tables_RM[0, 0])
    case.v_slab[0, first, 0] = 0.0
    for gap in (8.0, 11.0, 11.5, 12.0, 14.0):
        case.k_slab[0, first, :, 0] = gap / 64
        got = case.narrowed(torch.int8).run()
        others = (keys - 1) * math.exp(-gap)
        torch.testing.assert_close(got, torch.full_like(got, others / (1 + others)), rtol=0.01, atol=0)


def test_nothing_vanishes_over_int8(isa: str) -> None:
    """NaN in a query, a key or a value stays NaN, and stays in its row; weights of 0 do not meet stale scales."""
    case = paged([(0, 20), (0, 5)], [0, 0], 64).narrowed(torch.int8)
    clean = case.run()
    case.q_TQD[3, 1, 7] = torch.nan
    got = case.run()
    assert got[3, 1].isnan().all()
    got[3, 1] = clean[3, 1]
    assert torch.equal(got, clean) and clean.isfinite().all()


def one_chunk(case: Paged, r: int, first: int, count: int) -> Paged:
    """Rows [first, first + count) of sequence r, alone in a batch."""
    row = int(case.cu_R[r]) + first
    return Paged(
        case.q_TQD[row : row + count].clone(),
        case.k_slab,
        case.v_slab,
        torch.tensor([0, count], dtype=torch.int32),
        case.start_R[r : r + 1] + first,
        case.tables_RM[r : r + 1].clone(),
        case.kv_of_head,
        case.scale,
    )


@use_fixture
@given(
    chunks=st.lists(chunk, min_size=2, max_size=4), kv_of_head=heads, cut=st.integers(1, 80), seed=st.integers(0, 99),
    dtype=kv_dtypes, dim=st.sampled_from([32, 64]),
)  # fmt: skip
def test_batch_and_chunk_invariance(
    isa: str, chunks: list[tuple[int, int]], kv_of_head: list[int], cut: int, seed: int, dtype: torch.dtype, dim: int
) -> None:
    """A sequence alone, cut in two chunks, and its last row alone (as a decode) give the bits of the mixed batch."""
    case = paged(chunks, kv_of_head, dim, 0, seed).narrowed(dtype)
    whole = case.run()
    for r, (_, count) in enumerate(chunks):
        expected = whole[case.cu_R[r] : case.cu_R[r + 1]]
        at = min(cut, count - 1)
        parts = [one_chunk(case, r, 0, at).run()] if at else []
        parts.append(one_chunk(case, r, at, count - at).run())
        assert torch.equal(torch.cat(parts), expected)
        assert torch.equal(one_chunk(case, r, count - 1, 1).run(), expected[-1:])


@pytest.mark.parametrize("n", [2, 3])
def test_thread_invariance(isa: str, n: int) -> None:
    case = paged([(0, 70), (200, 1), (33, 40), (64, 1)], [0, 0, 0, 1, 1], 64)
    alone = case.run()
    kernels.set_threads(n)
    for _ in range(20):
        assert torch.equal(case.run(), alone)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8])
@pytest.mark.parametrize("size", [1e4, 1e15])
def test_large_scores_do_not_overflow(isa: str, size: float, dtype: torch.dtype) -> None:
    case = paged([(40, 20)], [0, 0], 64).narrowed(dtype)
    case.q_TQD *= size
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_a_negative_scale_turns_the_scores(isa: str, dtype: torch.dtype) -> None:
    case = paged([(40, 20), (90, 1)], [0, 0, 1], 64).narrowed(dtype)
    case.scale *= -1
    torch.testing.assert_close(case.run(), case.reference(), rtol=5e-4, atol=5e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
def test_head_size_not_a_multiple_of_16_takes_the_reference(isa: str, dtype: torch.dtype) -> None:
    case = paged([(5, 20)], [0, 0], 24).narrowed(dtype)
    torch.testing.assert_close(case.run(), case.reference(), rtol=1e-5, atol=1e-5)


def test_no_sequences_leave_the_output_alone(isa: str) -> None:
    case = paged([(0, 3)], [0], 16)
    case.cu_R, case.start_R, case.tables_RM = torch.zeros(1, dtype=torch.int32), case.start_R[:0], case.tables_RM[:0]
    assert torch.equal(case.run(), torch.full_like(case.q_TQD, -7.0))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("tables_RM", torch.tensor([[99, 0]], dtype=torch.int32), r"tables_RM holds 99, outside \[0, 4\)"),
        ("tables_RM", torch.tensor([[1]], dtype=torch.int32), r"reads keys 0..20, its block table holds 16"),
        ("kv_of_head", torch.tensor([0, 2], dtype=torch.int32), r"kv_of_head holds 2"),
        ("cu_R", torch.tensor([0, 21], dtype=torch.int32), r"cu_R must not fall nor leave \[0, 20\]"),
        ("cu_R", torch.tensor([0, 20]), r"cu_R is int64 .* must be contiguous int32"),
        ("q_TQD", torch.zeros(20, 2, 32)[:, :, ::2], r"q_TQD .* must be contiguous"),
        ("v_slab", torch.zeros(1, 4, 16, 32), r"v_slab is float32 \(1, 4, 16, 32\)"),
    ],
)
def test_wrong_arguments_are_refused(field: str, value: torch.Tensor, message: str) -> None:
    case = paged([(0, 20)], [0, 0], 16)
    setattr(case, field, value)
    with pytest.raises(ValueError, match=message):
        case.run()
