"""The reader of measured operator tables, on files of the package's form and, where it is installed, on the package."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from evener.errors import InvalidInput
from evener.profile import aiconfigurator
from evener.profile.fit import nonnegative_fit
from evener.spec.cluster import parse_device
from evener.spec.cluster_text import cluster_from_mapping

parquet = pytest.importorskip("pyarrow.parquet", reason="the extra `tables` is not installed")


needs_package = pytest.mark.skipif(find_spec("aiconfigurator_core") is None, reason="the extra `tables` is missing")


@needs_package
def test_measured_operators_keep_to_the_published_peaks() -> None:
    tables = aiconfigurator.load_tables("h100_sxm")
    assert "vllm" in tables.source and {"bf16", "fp8"} <= set(tables.gemm)
    one, many = tables.gemm["bf16"].ns(np.array([1, 4096]), 8192, 8192)
    assert 0.5 * 3350 < 2 * 8192 * 8192 / one < 3350  # GB/s
    assert 0.5 * 989 < 2e-3 * 4096 * 8192 * 8192 / many < 989  # Tflop/s
    fit = next(f for f in tables.prefill if (f.heads, f.kv_heads, f.head_dim) == (8, 1, 128))
    assert 0.4 * 989 < 4 * 128 * 8 / fit.unit_ns / 1e3 < 989 and fit.error < 0.1
    two = next(c for c in tables.collectives if c.ranks == 2)
    assert 1 << 20 in dict(two.points) and 2_000 < two.points[0][1] < 20_000


@needs_package
def test_devices_without_tables_are_refused() -> None:
    raw = {"hosts": [{"name": "far", "devices": [{"device": "cuda:0", "profile": "t4"}]}]}
    with pytest.raises(InvalidInput, match=r"no measured operators for t4.*h100_sxm"):
        aiconfigurator.tables_of(cluster_from_mapping(raw).devices[0])
    with pytest.raises(InvalidInput, match="cpu:0"):
        aiconfigurator.tables_of(parse_device("cpu:0"))
    with pytest.raises(InvalidInput, match="'abacus'"):
        aiconfigurator.load_tables("abacus")
    with pytest.raises(InvalidInput, match="engine 'none'"):
        aiconfigurator.load_tables("h100_sxm", "none")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aiconfigurator, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"pip install 'evener\[tables\]'"):
        aiconfigurator._root()


def test_a_kernel_that_is_started_without_a_graph_does_not_count(tmp_path: Path) -> None:
    import pyarrow as pa

    folder = tmp_path / "vllm" / "0.9.0"
    folder.mkdir(parents=True)
    (tmp_path / "vllm" / "0.10.0").mkdir()
    rows = {
        "op_name": ["all_reduce"] * 4, "num_gpus": [2] * 4, "message_size": [512, 512, 1024, 1024],
        "kernel_source": ["vLLM_custom_graph", "vLLM_custom_eager"] * 2, "latency": [0.004, 0.001, 0.006, 0.002],
    }  # fmt: skip
    parquet.write_table(pa.table(rows), folder / "custom_allreduce_perf.parquet")
    (found,) = aiconfigurator._collectives(tmp_path, "vllm")
    assert found.points == ((1024, 4000.0), (2048, 6000.0))  # bytes: two per element


def test_a_fit_finds_the_factors_and_none_is_negative() -> None:
    rng = np.random.default_rng(0)
    features = rng.uniform(0, 1000, (200, 3))
    times = features @ np.array([2.0, 0.0, 5.0]) + 1.0
    fit = nonnegative_fit(features, times * rng.uniform(0.98, 1.02, 200))
    assert fit.factors == pytest.approx([2.0, 0.0, 5.0], abs=0.1) and fit.error < 0.02
    assert (nonnegative_fit(features, np.maximum(1.0, 3000 - features[:, 0])).factors >= 0).all()


def test_where_points_say_nothing_a_fit_stays_near_the_prior() -> None:
    features = np.stack([np.linspace(1, 100, 50), np.zeros(50)], axis=1)
    fit = nonnegative_fit(features, 3 * features[:, 0], prior=np.array([1.0, 7.0]), pull=0.1)
    assert fit.factors == pytest.approx([3.0, 7.0], rel=0.05)


def test_bad_points_are_refused() -> None:
    with pytest.raises(ValueError, match="same, positive length"):
        nonnegative_fit(np.ones((3, 1)), np.ones(2))
    with pytest.raises(ValueError, match="times positive"):
        nonnegative_fit(np.ones((2, 1)), np.array([1.0, 0.0]))
