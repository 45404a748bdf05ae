"""Measures devices and collectives, and keeps the figures.

`measure(cluster)` measures in seconds, each device in its own pinned process; `load_profile(cluster)` gives what was
kept; `local_devices()` says what this host has. The figures are `evener.cost.rates.Profile`. `load_cluster(path)` reads
a cluster whose devices need not be here, and `profile_of(cluster)` gives figures for all of them.
"""

from evener.profile.cluster import load_cluster, profile_of
from evener.profile.hardware import check_present, local_devices
from evener.profile.measure import measure
from evener.profile.store import load_profile, profile_path, save_profile

__all__ = [
    "check_present",
    "load_cluster",
    "load_profile",
    "local_devices",
    "measure",
    "profile_of",
    "profile_path",
    "save_profile",
]
