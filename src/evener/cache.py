"""Where Evener keeps what it measured or made and can measure or make again."""

import os
from pathlib import Path


def cache_dir() -> Path:
    """`EVENER_CACHE`, or `~/.cache/evener`."""
    return Path(os.environ.get("EVENER_CACHE") or Path.home() / ".cache" / "evener")
