"""Every native test runs on every instruction set this processor has."""

from collections.abc import Iterator

import pytest
import torch

from evener import kernels
from evener.kernels import _native

SUPPORTED = _native.supported_isas().split(", ")


@pytest.fixture(params=SUPPORTED)
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """An instruction set in use for one test."""
    before = kernels.isa()
    kernels.set_isa(request.param)
    assert kernels.isa() == request.param
    yield request.param
    kernels.set_isa(before)


@pytest.fixture(autouse=True)
def one_torch_thread() -> Iterator[None]:
    """Loads stay short on a shared machine; kernel threads are put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    kernels.set_threads(1)
