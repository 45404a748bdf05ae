"""Where Evener keeps what it measured or made and can measure or make again."""

import os
from pathlib import Path

from evener.errors import InvalidInput
from evener.units import Bytes

DEFAULT_WEIGHTS_GIB = 20.0


def cache_dir() -> Path:
    """`EVENER_CACHE`, or `~/.cache/evener`. Raises RuntimeError when there is no home."""
    return Path(os.environ.get("EVENER_CACHE") or Path.home() / ".cache" / "evener")


def cache_name() -> str:
    """What to call it in a message about it."""
    said = os.environ.get("EVENER_CACHE")
    return f"EVENER_CACHE={said}" if said else "~/.cache/evener"


def weights_limit() -> Bytes:
    """What packed weights may take there, `EVENER_WEIGHTS_GIB`. Raises InvalidInput."""
    said = os.environ.get("EVENER_WEIGHTS_GIB") or str(DEFAULT_WEIGHTS_GIB)
    try:
        gib = float(said)
        if not 0 <= gib <= 1e6:
            raise ValueError
    except ValueError:
        raise InvalidInput(
            f"EVENER_WEIGHTS_GIB={said!r} is no number of GiB from 0 (keep no packed weights) to 1000000"
        ) from None
    return Bytes(int(gib * 2**30))
