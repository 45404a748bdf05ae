"""Norms, rotary embedding with the KV write, and SwiGLU's product, against the reference."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evener import kernels
from evener.kernels import reference

use_fixture = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def close(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@use_fixture
@given(rows=st.integers(0, 9), width=st.integers(1, 200), margin=st.integers(0, 3), seed=st.integers(0, 99))
def test_norms(isa: str, rows: int, width: int, margin: int, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, width + margin, generator=g)[:, :width]
    residual, weight = torch.randn(rows, width, generator=g), torch.randn(width, generator=g)
    out, expected = torch.empty(rows, width), torch.empty(rows, width)
    kernels.rms_norm(x, weight, 1e-5, out)
    reference.rms_norm(x, weight, 1e-5, expected)
    close(out, expected)
    summed = residual.clone()
    kernels.add_rms_norm(residual, x, weight, 1e-5, out)
    reference.add_rms_norm(summed, x, weight, 1e-5, expected)
    assert torch.equal(residual, summed)
    close(out, expected)


def test_norm_per_head_in_a_view(isa: str) -> None:
    x = torch.randn(5, 4 * 16 + 8)
    heads, weight = x[:, :64].unflatten(1, (4, 16)), torch.randn(16)
    expected = torch.empty(5, 4, 16)
    reference.rms_norm(heads, weight, 1e-6, expected)
    beside = x[:, 64:].clone()
    kernels.rms_norm(heads, weight, 1e-6, heads)
    close(heads, expected)
    assert torch.equal(x[:, 64:], beside)


@use_fixture
@given(
    rows=st.integers(0, 40),
    n_q=st.integers(1, 5),
    n_kv=st.integers(1, 3),
    dim=st.sampled_from([2, 8, 30, 64, 80, 128]),
    normed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_rope_and_kv_write(isa: str, rows: int, n_q: int, n_kv: int, dim: int, normed: bool, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    blocks, limit = 4, 50
    qkv = torch.randn(rows, (n_q + 2 * n_kv) * dim, generator=g)
    angle = torch.rand(limit, dim // 2, generator=g) * 6.3
    positions = torch.randint(limit, (rows,), generator=g, dtype=torch.int32)
    slots = torch.randperm(blocks * 16, generator=g)[:rows].to(torch.int32)
    slots[torch.rand(rows, generator=g) < 0.2] = -1
    norms = [torch.randn(dim, generator=g) for _ in range(2)] if normed else [None, None]
    got, expected = (
        (
            torch.full((n_kv, blocks, dim, 16), 9.0),
            torch.full((n_kv, blocks, 16, dim), 9.0),
            torch.empty(rows, n_q, dim),
        )
        for _ in range(2)
    )
    for run, (k, v, q) in ((kernels.rope_write_kv, got), (reference.rope_write_kv, expected)):
        run(qkv, angle.cos(), angle.sin(), positions, slots, k, v, n_q, n_kv, q, *norms, eps=1e-6)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@use_fixture
@given(
    rows=st.integers(1, 40), n_kv=st.integers(1, 3), dim=st.sampled_from([2, 30, 64, 80]), seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.bfloat16, torch.int8]),
)  # fmt: skip
def test_kv_write_of_narrow_types(isa: str, rows: int, n_kv: int, dim: int, seed: int, dtype: torch.dtype) -> None:
    """What is read back is what the reference wrote, up to one rounding the other way; other tokens stay."""
    g = torch.Generator().manual_seed(seed)
    blocks = 4
    qkv = torch.randn(rows, (1 + 2 * n_kv) * dim, generator=g)
    qkv[0] = 0
    angle = torch.rand(50, dim // 2, generator=g) * 6.3
    positions = torch.randint(50, (rows,), generator=g, dtype=torch.int32)
    slots = torch.randperm(blocks * 16, generator=g)[:rows].to(torch.int32)
    shapes = ((16 * (dim + 4),),) * 2 if dtype is torch.int8 else ((dim, 16), (16, dim))
    read = []
    for run in (kernels.rope_write_kv, reference.rope_write_kv):
        k, v = (torch.ones(n_kv, blocks, *shape, dtype=dtype) for shape in shapes)
        run(qkv, angle.cos(), angle.sin(), positions, slots, k, v, 1, n_kv, torch.empty(rows, 1, dim))
        every = torch.arange(blocks)
        read.append((reference.keys_of(k, every, dim).float(), reference.values_of(v, every, dim).float()))
    for got, expected in zip(*read, strict=True):
        step = expected.abs().amax() / (127 if dtype is torch.int8 else 256)
        torch.testing.assert_close(got, expected, rtol=0, atol=float(step) * 1.01)
        assert ((got - expected).abs() > step / 100).float().mean() < 0.02


@use_fixture
@given(
    first=st.integers(0, 20), rows=st.integers(1, 40), gap=st.integers(0, 40), dim=st.sampled_from([2, 30, 64, 80]),
    seed=st.integers(0, 99), dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.int8]),
)  # fmt: skip
def test_tokens_written_together_are_as_written_alone(
    isa: str, first: int, rows: int, gap: int, dim: int, seed: int, dtype: torch.dtype
) -> None:
    """Consecutive tokens, one of them perhaps not to be written, give the bits of each by itself; in any order."""
    g = torch.Generator().manual_seed(seed)
    n_kv, blocks = 2, 4
    qkv = torch.randn(rows, (1 + 2 * n_kv) * dim, generator=g)
    angle = torch.rand(64, dim // 2, generator=g) * 6.3
    slots = torch.arange(first, first + rows, dtype=torch.int32)
    if gap < rows:
        slots[gap] = -1 if seed % 3 else first  # or once more: the last one stays
    if seed % 5 == 0:
        slots = slots.flip(0)
    shapes = ((16 * (dim + 4),),) * 2 if dtype is torch.int8 else ((dim, 16), (16, dim))
    written = []
    for size in (rows, 1):
        kernels.set_threads(1 + seed % 2)
        slabs = [torch.ones(n_kv, blocks, *shape, dtype=dtype) for shape in shapes]
        for i in range(0, rows, size):
            at = slice(i, i + size)
            kernels.rope_write_kv(
                qkv[at],
                angle.cos(),
                angle.sin(),
                slots[at].clamp(0),
                slots[at],
                *slabs,
                1,
                n_kv,
                torch.empty(size, 1, dim),
            )
        written.append(slabs)
    kernels.set_threads(1)
    for together, alone in zip(*written, strict=True):
        assert torch.equal(together.view(torch.uint8), alone.view(torch.uint8))


def test_rope_is_the_half_split_convention(isa: str) -> None:
    """Element i turns with element i + D / 2, and the angle of column i is position * theta_i."""
    qkv = torch.zeros(1, 3 * 4)
    qkv[0, 0] = 1.0  # q = (1, 0, 0, 0)
    angle = torch.tensor([[0.0, 0.0], [0.5, 0.25]])
    q = torch.empty(1, 1, 4)
    slab = torch.zeros(1, 1, 4, 16), torch.zeros(1, 1, 16, 4)
    one, none = torch.tensor([1], dtype=torch.int32), torch.tensor([-1], dtype=torch.int32)
    kernels.rope_write_kv(qkv, angle.cos(), angle.sin(), one, none, *slab, 1, 1, q)
    close(q.flatten(), torch.tensor([0.87758256, 0.0, 0.47942554, 0.0]))


@use_fixture
@given(rows=st.integers(0, 9), width=st.integers(1, 70), spread=st.sampled_from([1.0, 30.0, 200.0]))
def test_silu_mul(isa: str, rows: int, width: int, spread: float) -> None:
    gate_up = torch.randn(rows, 2 * width) * spread
    out, expected = torch.empty(rows, width), torch.empty(rows, width)
    kernels.silu_mul(gate_up, out)
    reference.silu_mul(gate_up, expected)
    torch.testing.assert_close(out, expected, rtol=3e-6, atol=1e-30)


def test_rows_do_not_depend_on_threads_or_batch(isa: str) -> None:
    gate_up, weight = torch.randn(64, 2 * 1000), torch.randn(1000)
    alone = torch.empty(64, 1000)
    for r in range(64):
        kernels.silu_mul(gate_up[r : r + 1], alone[r : r + 1])
    normed = torch.empty(64, 1000)
    kernels.rms_norm(alone, weight, 1e-5, normed)
    kernels.set_threads(3)
    together, again = torch.empty(64, 1000), torch.empty(64, 1000)
    kernels.silu_mul(gate_up, together)
    kernels.rms_norm(together, weight, 1e-5, again)
    assert torch.equal(alone, together) and torch.equal(normed, again)


def test_other_dtypes_take_the_reference() -> None:
    x, weight, out = torch.randn(3, 8).bfloat16(), torch.ones(8).bfloat16(), torch.empty(3, 8).bfloat16()
    kernels.rms_norm(x, weight, 1e-5, out)
    torch.testing.assert_close(
        out.float(), torch.nn.functional.rms_norm(x.float(), (8,), eps=1e-5), rtol=1e-2, atol=1e-2
    )


def test_wrong_arguments_are_refused() -> None:
    x, out = torch.zeros(2, 8), torch.zeros(2, 8)
    with pytest.raises(ValueError, match=r"x_TH.* must be \[T, 4\]"):
        kernels.rms_norm(x, torch.ones(4), 1e-5, out)
    with pytest.raises(ValueError, match=r"residual_TH is float32 \(3, 8\)"):
        kernels.add_rms_norm(torch.zeros(3, 8), x, torch.ones(8), 1e-5, out)
    with pytest.raises(ValueError, match=r"gate_up_T2F is float32 \(2, 8\).* must be \(2, 16\)"):
        kernels.silu_mul(x, out)
    slabs = torch.zeros(1, 2, 4, 16), torch.zeros(1, 2, 16, 4)
    table, q = torch.zeros(10, 2), torch.zeros(1, 1, 4)

    def rope(position: int, slot: int) -> None:
        at = (torch.tensor([position], dtype=torch.int32), torch.tensor([slot], dtype=torch.int32))
        kernels.rope_write_kv(torch.zeros(1, 12), table, table, *at, *slabs, 1, 1, q)

    rope(9, 31)
    with pytest.raises(ValueError, match=r"positions holds 10, outside \[0, 10\)"):
        rope(10, 0)
    with pytest.raises(ValueError, match=r"kv_slot holds 32, outside \[-1, 32\)"):
        rope(0, 32)
