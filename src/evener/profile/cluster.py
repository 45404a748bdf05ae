"""Clusters as YAML files, and their profiles. The form is described in docs/clusters.md."""

from pathlib import Path

import yaml

from evener.cost.published import cluster_profile
from evener.cost.rates import Profile
from evener.errors import InvalidDevice
from evener.profile.store import load_profile
from evener.spec.cluster import Cluster
from evener.spec.cluster_text import cluster_from_mapping


def load_cluster(path: str | Path) -> Cluster:
    """Read a cluster; its devices need not be here. Raises InvalidDevice that names the file."""
    path = Path(path)
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InvalidDevice(f"cluster file {path} does not exist; check the path given to --cluster") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDevice(f"cluster file {path} cannot be read as text: {error}") from error
    except yaml.YAMLError as error:
        raise InvalidDevice(f"cluster file {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return cluster_from_mapping(raw)
    except InvalidDevice as error:
        raise InvalidDevice(f"cluster file {path}: {error.message}") from error


def profile_of(cluster: Cluster) -> Profile:
    """Figures for every device: kept measurements for this host's, published peaks for the others.

    Devices of this host without a kept measurement get assumed figures; the profile says so.
    """
    local = Cluster(tuple(d for d in cluster.devices if d.peaks is None))
    return cluster_profile(cluster, load_profile(local) if local.devices else None)
