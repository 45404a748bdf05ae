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


@use_fixture
@given(rows=st.integers(1, 30), n=st.integers(1, 70), threads=st.integers(1, 3))
def test_a_row_depends_on_nothing_else(isa: str, rows: int, n: int, threads: int) -> None:
    """The same bits alone and in any batch, on any number of threads."""
    x, w = torch.randn(rows, 700), kernels.pack_weight(torch.randn(n, 700))
    alone = torch.cat([kernels.linear(x[r : r + 1], w) for r in range(rows)])
    kernels.set_threads(threads)
    together = kernels.linear(x, w)
    kernels.set_threads(1)
    assert torch.equal(alone, together)


@use_fixture
@given(n=st.integers(1, 90), data=st.data())
def test_rows_and_parts(isa: str, n: int, data: st.DataObject) -> None:
    """Packing loses nothing: rows come back, and whole panels are a weight of their own."""
    w = torch.randn(n, 20)
    packed = kernels.pack_weight(w)
    index = torch.tensor(data.draw(st.lists(st.integers(0, n - 1), max_size=8)), dtype=torch.int64)
    assert torch.equal(packed.rows(index), w[index])
    start = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(start + 1, n))
    part, at = packed.part(start, stop)
    x = torch.randn(3, 20)
    assert torch.equal(kernels.linear(x, part)[:, at : at + stop - start], kernels.linear(x, packed)[:, start:stop])


def test_other_dtypes_are_kept_as_they_are() -> None:
    w = torch.randn(5, 4).bfloat16()
    packed = kernels.pack_weight(w)
    assert packed.columns == 0 and packed.data is w
    x = torch.randn(2, 4).bfloat16()
    assert torch.equal(kernels.linear(x, packed), F.linear(x, w))


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
