"""Plans as YAML files: read, check the form, write. The format is described in docs/plans.md."""

from pathlib import Path

import msgspec
import yaml

from evener.errors import InvalidInput, InvalidPlan
from evener.spec.model import ModelSpec
from evener.spec.plan import Interval, Plan, Shard, from_mapping

AUTO = "auto"
"""In the place of a file: choose the plan."""


def check_layout(plan: str, split: str, sizes: tuple[int, int, int]) -> None:
    """Refuse (InvalidInput) what would be ignored beside a plan, as that says it itself.

    sizes: of tensor, pipeline and data parallel.
    """
    if sizes != (1, 1, 1):
        raise InvalidInput(f"--plan {plan} says the layout itself; leave out -tp, -pp and -dp")
    if split != "time":
        raise InvalidInput(f"--split {split}: --plan {plan} says the splits itself; leave out --split")


def load_plan(path: str | Path, model: ModelSpec) -> Plan:
    """Read a plan for `model`; what the file leaves out is split evenly.

    Raises InvalidPlan naming the file: missing, not YAML, or not a plan. Whether the plan can work on given devices
    is for `evener.spec.plan.validate` to say.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InvalidPlan(f"plan file {path} does not exist; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidPlan(f"plan file {path} cannot be read as text: {error}") from error
    try:
        raw = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise InvalidPlan(f"plan file {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return from_mapping(raw, model)
    except InvalidPlan as error:
        raise InvalidPlan(f"plan file {path}: {error.message}") from error


def dump_plan(plan: Plan) -> str:
    """The YAML text of a plan, with every interval written out; `load_plan` reads it back unchanged."""
    lines = [f"name: {_scalar(plan.name)}", f"epoch: {plan.epoch}", "replicas:"]
    for replica in plan.replicas:
        lines += [f"  - role: {replica.role}", "    stages:"]
        for stage in replica.stages:
            lines += [f"      - layers: {_pair(stage.layers)}", "        shards:"]
            ends = [k for k in ("embed_rows", "head_rows") if any(getattr(sh, k) != (0, 0) for sh in stage.shards)]
            lines += [f"          - {_shard(shard, ends)}" for shard in stage.shards]
    return "\n".join(lines) + "\n"


def save_plan(plan: Plan, path: str | Path) -> None:
    """Write `dump_plan` to a file."""
    Path(path).write_text(dump_plan(plan), encoding="utf-8")


def _pair(interval: Interval) -> str:
    return f"[{interval[0]}, {interval[1]}]"


def _scalar(text: str) -> str:
    """A JSON string is a YAML string, whatever it contains."""
    return msgspec.json.encode(text).decode()


def _shard(shard: Shard, ends: list[str]) -> str:
    """One line; `ends` are the vocabulary splits that this stage has."""
    parts = [f"device: {_scalar(shard.device)}"]
    parts += [f"{key}: {_pair(getattr(shard, key))}" for key in ("heads", "ffn", *ends)]
    return "{" + ", ".join(parts) + "}"
