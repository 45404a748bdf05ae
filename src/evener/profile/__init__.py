"""Measures devices and collectives, and keeps the figures.

`measure(cluster)` measures in seconds, each device in its own pinned process; `load_profile(cluster)` gives what was
kept; `local_devices()` says what this host has. The figures are `evener.cost.rates.Profile`.
"""

from evener.profile.hardware import check_present, local_devices
from evener.profile.measure import measure
from evener.profile.store import load_profile, profile_path, save_profile

__all__ = ["check_present", "load_profile", "local_devices", "measure", "profile_path", "save_profile"]
