"""When requests arrive: arrays of n increasing times in seconds, the first one a gap after 0.

`burstiness` is the shape of the Gamma distribution of the gaps, as in vLLM's benchmark: 1 is a Poisson process,
below 1 is burstier, above 1 more even; the coefficient of variation of the gaps is 1 / sqrt(burstiness). Unlike
vLLM, the gaps are not stretched afterwards to hit the nominal duration: that would make a run of few requests
less variable than the process it stands for.
"""

import math

import numpy as np
from numpy.typing import NDArray

from evener.errors import InvalidTrace

Times = NDArray[np.float64]


def at_once(n: int) -> Times:
    """All at time 0."""
    return np.zeros(n)


def constant(n: int, rate: float) -> Times:
    """One every 1 / rate seconds."""
    _check(rate)
    return np.arange(1, n + 1) / rate


def poisson(n: int, rate: float, rng: np.random.Generator) -> Times:
    """Exponential gaps with mean 1 / rate."""
    _check(rate)
    return np.cumsum(rng.exponential(1.0 / rate, n))


def gamma(n: int, rate: float, burstiness: float, rng: np.random.Generator) -> Times:
    """Gamma gaps with mean 1 / rate and shape `burstiness`; infinite burstiness is a constant gap.

    Raises InvalidTrace unless rate and burstiness are positive.
    """
    _check(rate)
    if not burstiness > 0:
        raise InvalidTrace(
            f"burstiness {burstiness} is not positive; 1 is Poisson, below 1 burstier, above 1 more even"
        )
    if math.isinf(burstiness):
        return constant(n, rate)
    if burstiness == 1:
        return poisson(n, rate, rng)
    return np.cumsum(rng.gamma(burstiness, 1.0 / (rate * burstiness), n))


def _check(rate: float) -> None:
    if not (math.isfinite(rate) and rate > 0):
        raise InvalidTrace(f"rate {rate} is not a positive number of requests per second")
