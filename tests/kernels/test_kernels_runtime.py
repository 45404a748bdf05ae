"""The choice of the instruction set, and the pool."""

import os
import subprocess
import sys
import threading

import pytest
import torch

from evener import kernels
from evener.errors import InvalidInput


def test_isa_names() -> None:
    assert kernels.isa() in {"generic", "avx2", "avx512", "avx512vnni", "avx512bf16", "avx512amx"}
    with pytest.raises(InvalidInput, match=r"EVENER_ISA='sse9' cannot run on this processor; it supports generic"):
        kernels.set_isa("sse9")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "code"), [("generic", 0), ("mmx", 1)])
def test_isa_from_the_environment(name: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from evener import kernels; print(kernels.isa())"],
        env={**os.environ, "EVENER_ISA": name},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == code
    assert name in (done.stdout if code == 0 else done.stderr)


def test_set_threads() -> None:
    kernels.set_threads(3)
    assert kernels.threads() == 3
    kernels.set_threads(1)
    assert kernels.threads() == 1
    for n in (0, 257):
        with pytest.raises(InvalidInput, match=rf"{n} kernel threads asked for, 1\.\.256 are possible"):
            kernels.set_threads(n)


def test_pool_survives_many_small_jobs_from_two_callers() -> None:
    """The second caller runs its job itself; no job is lost, mixed up or run twice."""
    kernels.set_threads(3)
    weight, wrong = torch.ones(4096), []

    def caller(value: float) -> None:
        residual, x, out = torch.zeros(16, 4096), torch.full((16, 4096), value), torch.empty(16, 4096)
        for step in range(1, 201):
            kernels.add_rms_norm(residual, x, weight, 0.0, out)
            if not (residual == value * step).all():
                wrong.append((value, step))
                return

    callers = [threading.Thread(target=caller, args=(value,)) for value in (1.0, 2.0)]
    for t in callers:
        t.start()
    for t in callers:
        t.join()
    assert wrong == []


def test_pool_sleeps_and_wakes() -> None:
    kernels.set_threads(2)
    logits = torch.zeros(4, 40_000)
    for step in range(30):
        logits[:, step * 1000] = step + 1.0
        assert kernels.argmax_rows(logits)[0].tolist() == [step * 1000] * 4
        threading.Event().wait(0.001)  # longer than the helpers spin


def test_huge_pages_need_a_whole_page() -> None:
    assert kernels.advise_huge_pages(torch.empty(16)) is False
