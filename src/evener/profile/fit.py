"""Non-negative least squares on times: no operation makes a batch shorter."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import optimize

from evener.cost.rates import Floats


class Fit(NamedTuple):
    """Factors of the features, and how well they explain the times."""

    factors: Floats
    error: float
    """Median relative error on the points it was fitted to."""


def nonnegative_fit(
    features: NDArray[np.float64],
    times: NDArray[np.float64],
    prior: NDArray[np.float64] | None = None,
    pull: float = 0.0,
) -> Fit:
    """Factors >= 0 so that `features @ factors` is close to `times` in proportion: every relative error counts alike.

    `features` is [points, terms], `times` [points] and positive. `prior` gives factors to stay near where the points
    say little: `pull` is how many points with an error of 100% one factor that is off by 100% is worth.
    """
    if features.ndim != 2 or len(features) != len(times) or not len(times):
        raise ValueError(f"features {features.shape} and times {times.shape} must have the same, positive length")
    if not (np.isfinite(features).all() and (features >= 0).all() and (times > 0).all()):
        raise ValueError("features must be finite and not negative, times positive")
    weighted, target = features / times[:, None], np.ones(len(times))
    if prior is not None and pull > 0:
        near = np.diag(np.sqrt(pull) / np.maximum(prior, 1e-12))
        weighted, target = np.vstack([weighted, near]), np.concatenate([target, near @ prior])
    # Columns of one size: nnls works in absolute tolerances.
    scale = np.maximum(np.abs(weighted).max(axis=0), 1e-300)
    found, _ = optimize.nnls(weighted / scale, target)  # type: ignore[attr-defined]
    factors: Floats = found / scale
    error = float(np.median(np.abs(features @ factors - times) / times))
    return Fit(factors, error)
