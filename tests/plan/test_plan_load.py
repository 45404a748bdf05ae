"""Plan files: read, refused with the file's name, written and read back."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evener.cost.rates import default_profile
from evener.errors import InvalidPlan
from evener.plan.default import default_plan
from evener.plan.load import dump_plan, load_plan, save_plan
from evener.spec.cluster import Cluster, parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import validate
from evener.spec.traffic import TrafficMix

SMOL = ModelSpec("llama", 49152, 576, 30, 9, 3, 64, 1536, 8192, tied=True)
DOCS = Path(__file__).parents[2] / "docs" / "plans.md"


def test_the_documented_example_works(tmp_path: Path) -> None:
    (example,) = re.findall(r"```yaml\n(.*?)```", DOCS.read_text(), re.DOTALL)
    (tmp_path / "plan.yaml").write_text(example)
    plan = load_plan(tmp_path / "plan.yaml", SMOL)
    validate(plan, SMOL, Cluster(tuple(parse_device(f"cpu:{k}") for k in range(3))))
    assert plan.name == "lopsided"
    assert [s.layers for s in plan.replicas[0].stages] == [(0, 20), (20, 30)]
    assert plan.replicas[0].stages[1].shards[0].head_rows == (0, 49152)


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.integers(1, 2), st.sampled_from([1, 30]))
def test_what_is_written_reads_back(
    tmp_path_factory: pytest.TempPathFactory, tp: int, pp: int, dp: int, slow: int
) -> None:
    devices = [parse_device(f"cpu:{k // 2}#{k}" + (f",slowdown={slow}" if k % 3 else "")) for k in range(tp * pp * dp)]
    plan = default_plan(SMOL, devices, tp, pp, dp, default_profile(devices), TrafficMix())
    path = tmp_path_factory.mktemp("plans") / "plan.yaml"
    save_plan(plan, path)
    assert load_plan(path, SMOL) == plan


def test_names_survive_whatever_they_contain(tmp_path: Path) -> None:
    plan = load_plan(
        _write(tmp_path, 'name: "a: b # \\"c\\"\\n- ü"\nreplicas: [{stages: [{shards: ["cpu:0#1"]}]}]'), SMOL
    )
    assert load_plan(_write(tmp_path, dump_plan(plan)), SMOL) == plan


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("replicas: [", r"plan.yaml is not YAML: while parsing"),
        ("", r"plan.yaml: a plan is a mapping with a list `replicas`"),
        ("replicas: [{stages: [{layers: [0, x], shards: [a]}]}]", r"plan.yaml: the plan does not parse: .*layers"),
        ("replicas: [{stages: [{shards: [a]}]}]\nepochs: 3", r"plan.yaml: the plan does not parse: .*`epochs`"),
        ("!!python/object/apply:os.getcwd []", r"plan.yaml is not YAML: could not determine a constructor"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(InvalidPlan, match=message):
        load_plan(_write(tmp_path, text), SMOL)


def test_unreadable_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidPlan, match=r"none.yaml does not exist; check the path"):
        load_plan(tmp_path / "none.yaml", SMOL)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(InvalidPlan, match=r"binary.yaml cannot be read as text"):
        load_plan(tmp_path / "binary.yaml", SMOL)
    with pytest.raises(InvalidPlan, match="cannot be read as text"):
        load_plan(tmp_path, SMOL)


def _write(directory: Path, text: str) -> Path:
    path = directory / "plan.yaml"
    path.write_text(text, encoding="utf-8")
    return path
