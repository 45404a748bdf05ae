"""docs/clusters.md: its example is a cluster, and it names all published peaks."""

import re
from pathlib import Path

import yaml

from evener.spec.cluster_text import cluster_from_mapping
from evener.spec.peaks import PUBLISHED

TEXT = (Path(__file__).parents[2] / "docs" / "clusters.md").read_text()


def test_the_example_is_a_cluster() -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", TEXT, re.DOTALL)
    cluster = cluster_from_mapping(yaml.safe_load(example))
    assert len(cluster.devices) == 2 + 16 + 1
    assert cluster.device("dgx-1/cuda:7").memory == 76 * 10**9


def test_all_published_peaks_are_named() -> None:
    (named,) = re.findall(r"`profile` names published peaks: (.*?)\.\n", TEXT, re.DOTALL)
    assert set(re.findall(r"`(\w+)`", named)) == set(PUBLISHED)
