"""Reads the measured operator tables of NVIDIA's `aiconfigurator-core` (Apache-2.0; the extra `tables`).

The package holds latencies of single operators, measured on idle GPUs with the kernels of vLLM, SGLang and
TensorRT-LLM, as Parquet files by system, operator, engine and version. Only its data files are read; none of its code
runs. Message sizes of its all-reduces are counts of 16-bit elements; latencies are milliseconds.
"""

import importlib
import re
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evener.cost.rates import Collective
from evener.cost.tables import AttentionFit, GemmGrid, OperatorTables
from evener.errors import InvalidInput
from evener.profile.fit import nonnegative_fit
from evener.spec.cluster import Device

PACKAGE = "aiconfigurator-core"
ENGINES = ("vllm", "sglang", "trtllm")
SYSTEMS = {
    "a100_sxm_80gb": "a100_sxm", "h100_sxm": "h100_sxm", "h200_sxm": "h200_sxm", "b200_sxm": "b200_sxm",
    "l40s": "l40s", "rtx_pro_6000": "rtx_pro_6000_server",
}  # fmt: skip
"""Names of published peaks -> systems of the package. The RTX PRO 6000 was measured in its server edition."""
_GEMM_DTYPES = {"bf16": "bfloat16", "fp8": "fp8", "fp8_block": "fp8_block", "int8": "int8_wo"}
_KV_DTYPES = {"bf16": ("bfloat16", "float16"), "fp8": ("fp8",)}

Columns = dict[str, NDArray[Any]]


def tables_of(device: Device, engine: str = "vllm") -> OperatorTables:
    """The tables of a device with published peaks. Raises InvalidInput where the package or the device lacks them."""
    name = device.peaks.name if device.peaks is not None else ""
    if name not in SYSTEMS:
        raise InvalidInput(
            f"device {device.name}: no measured operators for {name or 'it'}; there are some for {', '.join(SYSTEMS)}"
        )
    return load_tables(SYSTEMS[name], engine)


@lru_cache(maxsize=16)
def load_tables(system: str, engine: str = "vllm") -> OperatorTables:
    """All tables of one system and engine, newest version. A second or so; kept. Raises InvalidInput."""
    if engine not in ENGINES:
        raise InvalidInput(f"engine {engine!r} is not one of {', '.join(ENGINES)}")
    root = _root() / "data" / system
    if not root.is_dir():
        have = ", ".join(sorted(p.name for p in root.parent.iterdir() if (p / "gemm").is_dir()))
        raise InvalidInput(f"no measured operators for system {system!r} (there are: {have})")
    gemm, at = _read(root / "gemm" / engine, "gemm_perf.parquet")
    context, _ = _read(root / "attention" / engine, "context_attention_perf.parquet")
    generation, _ = _read(root / "attention" / engine, "generation_attention_perf.parquet")
    return OperatorTables(
        system=system,
        source=f"{PACKAGE} {version(PACKAGE)}, {engine} {at}",
        gemm={ours: grid for ours, theirs in _GEMM_DTYPES.items() if (grid := _grid(gemm, theirs)) is not None},
        prefill=_attention(context, prefill=True),
        decode=_attention(generation, prefill=False),
        collectives=_collectives(root / "comm", engine),
    )


def _root() -> Path:
    spec = find_spec("aiconfigurator_core")
    try:
        version(PACKAGE)
        import pyarrow  # noqa: F401
    except (PackageNotFoundError, ImportError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        raise InvalidInput(
            f"measured operator tables need the package {PACKAGE}; install it with: pip install 'evener[tables]'"
        )
    return Path(spec.submodule_search_locations[0]) / "systems"


def _version_key(path: Path) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", path.name))


def _read(folder: Path, file: str) -> tuple[Columns, str]:
    """Columns of the newest version that has the file, and the version."""
    parquet: Any = importlib.import_module("pyarrow.parquet")  # of the extra, so that types do not depend on it
    versions = sorted((p for p in folder.glob("*") if (p / file).is_file()), key=_version_key)
    if not versions:
        raise InvalidInput(f"{PACKAGE} has no {file} in {folder.name} for {folder.parent.parent.name}")
    table = parquet.read_table(versions[-1] / file)
    return {c: table.column(c).to_numpy(zero_copy_only=False) for c in table.column_names}, versions[-1].name


def _where(table: Columns, chosen: NDArray[np.bool_]) -> Columns:
    return {c: values[chosen] for c, values in table.items()}


def _grid(table: Columns, dtype: str) -> GemmGrid | None:
    """The fastest kernel at every point; few and large points were not measured and follow from smaller ones."""
    t = _where(table, table["gemm_dtype"] == dtype)
    axes = [np.unique(t[c]) for c in "mnk"]
    if not len(t["m"]) or min(map(len, axes)) < 4:
        return None
    ns = np.full([len(a) for a in axes], np.inf)
    at = tuple(np.searchsorted(a, t[c]) for a, c in zip(axes, "mnk", strict=True))
    np.minimum.at(ns, at, t["latency"].astype(np.float64) * 1e6)
    for axis, sizes in ((2, axes[2]), (1, axes[1]), (0, axes[0])):
        along = np.moveaxis(ns, axis, 0)  # a view
        for k in range(1, len(sizes)):
            lacking = ~np.isfinite(along[k])
            along[k][lacking] = (along[k - 1] * (sizes[k] / sizes[k - 1]))[lacking]
    if not np.isfinite(ns).all():
        return None
    return GemmGrid(axes[0].tolist(), axes[1].tolist(), axes[2].tolist(), ns)


def _attention(table: Columns, prefill: bool) -> tuple[AttentionFit, ...]:
    """One fit per number of heads, of KV heads, head size and dtype of K and V; the whole context."""
    if "window_size" in table:
        table = _where(table, table["window_size"] == 0)
    stored = table["kv_cache_dtype"].astype(str)
    return tuple(f for ours, theirs in _KV_DTYPES.items()
                 for f in _fits(_where(table, np.isin(stored, theirs)), ours, prefill))  # fmt: skip


def _fits(t: Columns, kv_dtype: str, prefill: bool) -> list[AttentionFit]:
    shapes = sorted(set(zip(t["num_heads"].tolist(), t["num_key_value_heads"].tolist(), t["head_dim"].tolist(),
                            strict=True)))  # fmt: skip
    fits = []
    for heads, kv, dim in shapes:
        q = _where(t, (t["num_heads"] == heads) & (t["num_key_value_heads"] == kv) & (t["head_dim"] == dim))
        batch, length = q["batch_size"].astype(np.float64), (q["isl"] if prefill else q["step"] + 1).astype(np.float64)
        rows = batch * length if prefill else batch
        units = batch * length * (length + 1) / 2 if prefill else batch * length
        if len(rows) < 8:
            continue
        features = np.stack([np.ones(len(rows)), rows, units], axis=1)
        fit = nonnegative_fit(features, q["latency"].astype(np.float64) * 1e6)
        # Without KV heads of its own a query head reads those of its group.
        fixed, per_row, per_unit = map(float, fit.factors)
        fits.append(AttentionFit(heads, kv or heads, dim, fixed, per_row, per_unit, fit.error, kv_dtype))
    return fits


def _collectives(folder: Path, engine: str) -> tuple[Collective, ...]:
    """The fastest all-reduce by ranks and size: the engine's own kernels, started by a graph, or NCCL's."""
    best: dict[tuple[int, int], float] = {}

    def add(t: Columns) -> None:
        for ranks, elements, ms in zip(t["num_gpus"], t["message_size"], t["latency"], strict=True):
            at = int(ranks), 2 * int(elements)
            best[at] = min(best.get(at, np.inf), float(ms) * 1e6)

    for name, file in ((engine, "custom_allreduce_perf.parquet"), ("nccl", "nccl_perf.parquet")):
        try:
            t, _ = _read(folder / name, file)
        except InvalidInput:
            continue  # some systems have one of the two only; none at all is told by the caller's profile
        t = _where(t, t["op_name"].astype(str) == "all_reduce")
        if "nccl_dtype" in t:
            t = _where(t, t["nccl_dtype"].astype(str) == "half")
        if "kernel_source" in t:
            t = _where(t, ~np.char.endswith(t["kernel_source"].astype(str), "_eager"))
        add(t)
    out = []
    for ranks in sorted({r for r, _ in best if r > 1}):
        points = tuple((size, ns) for (r, size), ns in sorted(best.items()) if r == ranks)
        out.append(Collective("measured", ranks, points))
    return tuple(out)
