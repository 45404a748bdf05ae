"""Which instruction set the native kernels use, and how many threads."""

import os

import torch

from evener.errors import InvalidInput
from evener.kernels import _native


def isa() -> str:
    """The instruction set in use: `generic`, `avx2`, `avx512`, `avx512vnni` (avx512 but for int8 products and attention
    over an int8 cache), `avx512bf16` (that but for bf16 products), or `avx512amx` (that but for int8 and bf16 products
    by tile registers).

    It is the processor's best unless EVENER_ISA says otherwise.
    """
    return _native.isa()


def set_isa(name: str) -> None:
    """Use this instruction set from now on; empty: the best there is. Raises InvalidInput."""
    if not _native.choose_isa(name):
        raise InvalidInput(
            f"EVENER_ISA={name!r} cannot run on this processor; it supports {_native.supported_isas()} "
            "(leave the variable unset to get the best)"
        )


def threads() -> int:
    """Threads the native kernels run on, the caller included."""
    return _native.threads()


def set_threads(n: int) -> None:
    """Run kernels on `n` threads (1..256), the caller included; 1, the default, has no overhead.

    Helpers inherit the caller's CPU affinity, spin for 20 us after a kernel and then sleep. Results do not depend on
    `n`. Not to be called while a kernel runs, nor before a fork that runs kernels. Raises InvalidInput.
    """
    if not 1 <= n <= 256:
        raise InvalidInput(f"{n} kernel threads asked for, 1..256 are possible; use the number of the worker's cores")
    _native.set_threads(n)


def advise_huge_pages(tensor: torch.Tensor) -> bool:
    """Ask the system to back a CPU tensor by huge pages; call it before the first write. False if it will not.

    KV blocks lie all over their slab, so that with small pages nearly every block costs a walk of the page table;
    decode attention over a long context is about a quarter faster with huge ones (benchmarks/kernels.py). Tensors
    below a few megabytes have no whole huge page.
    """
    return tensor.is_cpu and _native.advise_huge_pages(tensor.data_ptr(), tensor.nbytes)


set_isa(os.environ.get("EVENER_ISA", ""))
