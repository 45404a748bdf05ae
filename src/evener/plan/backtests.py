"""How far predictions were off on these devices: kept per host, read for the error bar of the next plan.

One JSON file per profile key (host, processor, versions) beside the profiles, a list of comparisons, newest last.
"""

from pathlib import Path
from statistics import median

import msgspec
from msgspec import Struct

from evener.cache import cache_dir
from evener.errors import InvalidInput
from evener.profile.hardware import profile_key
from evener.spec.model import ModelSpec

KEEP = 200


class BackTest(Struct, frozen=True):
    """One plan, predicted and then measured on the same traffic."""

    model: str
    """Family and size, as `describe_model` writes them."""
    plan: str
    devices: tuple[str, ...]
    predicted_tok_s: float
    achieved_tok_s: float
    dtype: str = ""
    """Of the weights; empty in comparisons kept before it was written down, which then count for none."""
    kv_dtype: str = ""
    """Of the KV cache."""

    @property
    def error(self) -> float:
        """Predicted over achieved, less one."""
        return self.predicted_tok_s / self.achieved_tok_s - 1


class ErrorBar(Struct, frozen=True):
    """Of the absolute errors of throughput on these devices, in these dtypes."""

    count: int
    median: float
    greatest: float


def describe_model(model: ModelSpec) -> str:
    """`llama 30x576`: enough to tell models apart."""
    return f"{model.family} {model.layers}x{model.hidden}"


def backtests_path() -> Path:
    """Where this host's comparisons are kept."""
    return cache_dir() / "backtests" / f"{profile_key()}.json"


def read_backtests(path: Path | None = None) -> list[BackTest]:
    """All that were kept; none when there is no file. Raises InvalidInput for a damaged one."""
    path = path or backtests_path()
    try:
        return msgspec.json.decode(path.read_bytes(), type=list[BackTest])
    except FileNotFoundError:
        return []
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise InvalidInput(f"back-tests {path} cannot be read: {error}; delete the file") from error


def keep_backtest(test: BackTest, path: Path | None = None) -> None:
    """Add one; the oldest beyond `KEEP` go."""
    path = path or backtests_path()
    kept = [*read_backtests(path), test][-KEEP:]
    path.parent.mkdir(parents=True, exist_ok=True)
    fresh = path.with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(kept))
    fresh.replace(path)


def error_bar(
    model: ModelSpec, devices: tuple[str, ...], dtype: str, kv_dtype: str, path: Path | None = None
) -> ErrorBar | None:
    """Errors of earlier predictions for this model in these dtypes over these devices or some of them; None when there
    are none."""
    what, mine = (describe_model(model), dtype, kv_dtype), set(devices)
    tests = [t for t in read_backtests(path) if (t.model, t.dtype, t.kv_dtype) == what and set(t.devices) <= mine]
    errors = [abs(t.error) for t in tests]
    return ErrorBar(len(errors), median(errors), max(errors)) if errors else None
