"""Linear layers with packed weights, against torch."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evener import kernels

use_fixture = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@use_fixture
@given(
    rows=st.integers(0, 40), n=st.integers(1, 90), k=st.sampled_from([1, 3, 16, 70, 640, 641, 1300]), bias=st.booleans()
)
def test_linear(isa: str, rows: int, n: int, k: int, bias: bool) -> None:
    """Any shape, whole panels or not, with inputs in one pass or several."""
    x, w = torch.randn(rows, k), torch.randn(n, k)
    b = torch.randn(n) if bias else None
    expected = F.linear(x.double(), w.double(), None if b is None else b.double())
    got = kernels.linear(x, kernels.pack_weight(w), b)
    assert got.shape == (rows, n)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6 * k)


dtypes = st.sampled_from([torch.float32, torch.bfloat16, torch.int8])
groups = st.sampled_from([64, 128, 192, 256])
VNNI = ("avx512vnni", "avx512bf16", "avx512amx")


def grouped(x: torch.Tensor, group: int) -> torch.Tensor:
    """[rows, groups, group], fp64, the last group padded with zeros."""
    return F.pad(x, (0, -x.shape[1] % group)).unflatten(1, (-1, group)).double()


def weight_steps(w: torch.Tensor, isa: str, group: int) -> torch.Tensor:
    """The quantisation step of every element of a weight, fp64; with VNNI the next bf16 above it or that itself."""
    groups = grouped(w, group)
    step = groups.abs().amax(-1, keepdim=True) / 127
    if isa in VNNI:
        bits = step.float().view(torch.int32)
        step = (bits + 0xFFFF & -0x10000).view(torch.float32).double()
    return step.expand_as(groups).flatten(1)[:, : w.shape[1]]


def input_steps(x: torch.Tensor, isa: str, group: int) -> torch.Tensor:
    """The quantisation step of every input, fp64: of 16 bits, or with VNNI 254 of them from the least to the most."""
    groups = grouped(x, group)
    step = groups.abs().amax(-1, keepdim=True) / 32767
    if isa in VNNI:
        step = (groups.amax(-1, keepdim=True).clamp_min(0) - groups.amin(-1, keepdim=True).clamp_max(0)) / 254
    return step.expand_as(groups).flatten(1)[:, : x.shape[1]]


def check_packed(got: torch.Tensor, w: torch.Tensor, dtype: torch.dtype, isa: str, group: int) -> None:
    """fp32 and bf16 come back as they were rounded, int8 as a whole number of steps, the nearest."""
    if dtype is not torch.int8:
        assert torch.equal(got, w.to(dtype).float())
        return
    step = weight_steps(w, isa, group)
    assert ((got.double() - w.double()).abs() <= 0.5001 * step).all()
    steps = got.double() / step.clamp_min(1e-300)
    torch.testing.assert_close(steps, steps.round(), rtol=0, atol=1e-4)


@use_fixture
@given(
    rows=st.integers(1, 40), n=st.integers(1, 90), k=st.sampled_from([1, 3, 64, 70, 576, 641]), bias=st.booleans(),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]),
)  # fmt: skip
def test_linear_over_bf16(isa: str, rows: int, n: int, k: int, bias: bool, size: float) -> None:
    """The weight is rounded, and the inputs where bf16 meets bf16; nothing else is."""
    x, w = torch.randn(rows, k), torch.randn(n, k) * size
    b = torch.randn(n) * size if bias else None
    taken = x.bfloat16() if isa in ("avx512bf16", "avx512amx") else x
    expected = F.linear(taken.double(), w.bfloat16().double(), None if b is None else b.double())
    got = kernels.linear(x, kernels.pack_weight(w, torch.bfloat16), b)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=2e-6 * k * size)


@use_fixture
@given(
    rows=st.integers(1, 40), n=st.integers(1, 90), k=st.sampled_from([1, 3, 64, 70, 576, 641]), bias=st.booleans(),
    size=st.sampled_from([1e-30, 1e-3, 1.0, 1e4]), group=groups,
)  # fmt: skip
def test_linear_over_int8(isa: str, rows: int, n: int, k: int, bias: bool, size: float, group: int) -> None:
    """Over the quantised weight the error is that of rounding the inputs: half a step of each group's scale."""
    x, w = torch.randn(rows, k), torch.randn(n, k) * size
    b = torch.randn(n) * size if bias else None
    packed = kernels.pack_weight(w, torch.int8, group)
    quantised = packed.rows(torch.arange(n)).double()
    check_packed(quantised.float(), w, torch.int8, isa, group)
    expected = F.linear(x.double(), quantised, None if b is None else b.double())
    got = kernels.linear(x, packed, b)
    allowed = 0.51 * input_steps(x, isa, group) @ quantised.abs().T + 1e-5 * expected.abs() + 2e-6 * k * size
    assert ((got.double() - expected).abs() <= allowed).all()


@use_fixture
@given(
    rows=st.integers(1, 80), n=st.integers(1, 90), k=st.sampled_from([1, 64, 70, 576]), bias=st.booleans(), group=groups
)
def test_int8_by_tiles_gives_the_same_bits(isa: str, rows: int, n: int, k: int, bias: bool, group: int) -> None:
    """Tile registers hold the same integers, and what follows is done in the same order."""
    if isa != "avx512amx":
        return
    x, w, b = torch.randn(rows, k), torch.randn(n, k), torch.randn(n) if bias else None
    by_tiles = kernels.linear(x, kernels.pack_weight(w, torch.int8, group), b)
    kernels.set_isa("avx512bf16")
    without = kernels.linear(x, kernels.pack_weight(w, torch.int8, group), b)
    kernels.set_isa(isa)
    assert torch.equal(by_tiles, without)


@pytest.mark.parametrize("more", [0, 4, 12, 25])
def test_int8_of_nothing_and_of_what_is_not_finite(isa: str, more: int) -> None:
    """Zeros are exact; NaN and infinity do not vanish in the quantisation, and reach no other row."""
    w = torch.randn(20, 100)
    w[3] = 0
    packed = kernels.pack_weight(w, torch.int8)
    x = torch.randn(4 + more, 100)
    x[1], x[2, 70], x[3, 5] = 0, torch.inf, torch.nan
    got = kernels.linear(x, packed)
    assert got[0].isfinite().all() and (got[:2, 3] == 0).all() and (got[1] == 0).all()
    assert got[2:4].isnan().all() and got[4:].isfinite().all()


@use_fixture
@given(rows=st.integers(1, 30), n=st.integers(1, 70), threads=st.integers(1, 3), dtype=dtypes, group=groups)
def test_a_row_depends_on_nothing_else(
    isa: str, rows: int, n: int, threads: int, dtype: torch.dtype, group: int
) -> None:
    """The same bits alone and in any batch, on any number of threads."""
    x, w = torch.randn(rows, 700), kernels.pack_weight(torch.randn(n, 700), dtype, group)
    alone = torch.cat([kernels.linear(x[r : r + 1], w) for r in range(rows)])
    kernels.set_threads(threads)
    together = kernels.linear(x, w)
    kernels.set_threads(1)
    assert torch.equal(alone, together)


@use_fixture
@given(n=st.integers(1, 90), k=st.sampled_from([1, 20, 64, 300]), dtype=dtypes, group=groups, data=st.data())
def test_rows_and_parts(isa: str, n: int, k: int, dtype: torch.dtype, group: int, data: st.DataObject) -> None:
    """Rows come back as they were packed, and whole panels are a weight of their own."""
    w = torch.randn(n, k)
    packed = kernels.pack_weight(w, dtype, group)
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=8)), dtype=torch.int64)
    check_packed(packed.rows(index), w[index], dtype, isa, group)
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    part, at = packed.part(start, stop)
    x = torch.randn(3, k)
    assert torch.equal(kernels.linear(x, part)[:, at : at + stop - start], kernels.linear(x, packed)[:, start:stop])


@use_fixture
@given(cut=st.sampled_from([0, 64, 128, 192]), n=st.integers(1, 40))
def test_int8_inputs_cut_on_groups_quantise_alike(isa: str, cut: int, n: int) -> None:
    """Two ranks that split the inputs on a group's border hold the very integers and scales of one."""
    w, x = torch.randn(n, 192), torch.randn(5, 192)
    whole = kernels.linear(x, kernels.pack_weight(w, torch.int8))
    parts = torch.zeros(5, n)
    for a, b in ((0, cut), (cut, 192)):
        if a < b:
            parts += kernels.linear(x[:, a:b], kernels.pack_weight(w[:, a:b].contiguous(), torch.int8))
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-5)  # the sums of fp32 alone


def test_other_dtypes_are_kept_as_they_are() -> None:
    w = torch.randn(5, 4).half()
    packed = kernels.pack_weight(w)
    assert packed.columns == 0 and packed.data is w
    x = torch.randn(2, 4).half()
    assert torch.equal(kernels.linear(x, packed), F.linear(x, w))


@pytest.mark.parametrize("group", [0, 32, 96, 320])
def test_a_group_that_no_kernel_has_is_refused(group: int) -> None:
    with pytest.raises(ValueError, match=f"group {group} must be a multiple of 64 up to 256"):
        kernels.pack_weight(torch.randn(5, 4), torch.int8, group)


def test_sums_of_the_largest_integers_do_not_overflow(isa: str) -> None:
    """All weights and inputs of a group at the ends of their ranges, at most rows of a tile and beyond."""
    for group in (64, kernels.MAX_QUANT_GROUP):
        w, x = torch.full((40, 512), -3.0), torch.full((20, 512), 5.0)
        w[::2] *= -1
        packed = kernels.pack_weight(w, torch.int8, group)
        expected = F.linear(x.double(), packed.rows(torch.arange(40)).double())
        torch.testing.assert_close(kernels.linear(x, packed).double(), expected, rtol=1e-2, atol=0)
        x[:, ::2] = -5.0
        expected = F.linear(x.double(), packed.rows(torch.arange(40)).double())
        torch.testing.assert_close(kernels.linear(x, packed).double(), expected, rtol=0, atol=0.01 * 3 * 5 * 512)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize(("n", "k"), [(0, 8), (8, 0)])
def test_a_weight_without_rows_or_inputs_gives_zeros(dtype: torch.dtype, n: int, k: int) -> None:
    packed = kernels.pack_weight(torch.randn(n, k), dtype)
    got = kernels.linear(torch.randn(3, k), packed)
    assert got.dtype is torch.float32 and torch.equal(got, torch.zeros(3, n))
    assert packed.rows(torch.zeros(0, dtype=torch.int64)).dtype is torch.float32


def test_int8_is_made_from_fp32() -> None:
    with pytest.raises(ValueError, match="weight_NK is bfloat16"):
        kernels.pack_weight(torch.randn(5, 4).bfloat16(), torch.int8)


def test_an_index_outside_the_embedding_is_refused(isa: str) -> None:
    packed = kernels.pack_weight(torch.randn(5, 4), torch.int8)
    with pytest.raises(ValueError, match=r"holds 5, outside \[0, 5\)"):
        packed.rows(torch.tensor([0, 5]))


def test_wrong_inputs_are_refused() -> None:
    packed = kernels.pack_weight(torch.randn(8, 4))
    with pytest.raises(ValueError, match="x_TK is float32"):
        kernels.linear(torch.randn(2, 5), packed)
    with pytest.raises(ValueError, match="x_TK is bfloat16"):
        kernels.linear(torch.randn(2, 4).bfloat16(), packed)
    with pytest.raises(ValueError, match="bias_N"):
        kernels.linear(torch.randn(2, 4), packed, torch.randn(7))


def test_a_weight_of_another_instruction_set_is_refused() -> None:
    before = kernels.isa()
    packed = kernels.pack_weight(torch.randn(8, 4))
    try:
        kernels.set_isa("generic")
        if before != "generic":
            with pytest.raises(ValueError, match="pack it again"):
                kernels.linear(torch.randn(2, 4), packed)
    finally:
        kernels.set_isa(before)
