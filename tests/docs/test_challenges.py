"""The page of challenges follows its inputs: causes that exist, benchmarks that exist, figures from their results."""

import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

from evener.ledger.causes import USEFUL, Cause

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "challenges.md").read_text()


def test_the_page_is_current() -> None:
    """What the script writes is what stands there; figures follow from `results/`, which a fresh clone lacks."""
    done = subprocess.run(
        [sys.executable, "docs/make_challenges.py", "--check"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_name_exists() -> None:
    labels = {c.label for c in Cause}
    named = set(re.findall(r"`(\w+)`", "\n".join(x for x in PAGE.splitlines() if x.startswith("## "))))
    assert named and named <= labels and not named & {c.label for c in USEFUL}
    scripts = re.findall(r"benchmarks/(\w+)\.py", PAGE)
    assert scripts and all((ROOT / "benchmarks" / f"{s}.py").exists() for s in scripts)


def test_figures_are_taken_from_results(tmp_path: Path, monkeypatch: Any) -> None:
    """Other results, other sentences; none, and the page keeps what it has, or says what to run."""
    page = runpy.run_path(str(ROOT / "docs" / "make_challenges.py"))
    there = page["load"].__globals__
    monkeypatch.setitem(there, "RESULTS", tmp_path)
    assert page["text"]() == PAGE
    monkeypatch.setitem(there, "TARGET", tmp_path / "none.md")
    wanted = sum(row.figure is not None for row in page["CHALLENGES"])
    assert page["text"]().count("not measured yet: run `benchmarks/") == wanted > 5
    account = {"total": {"wall_s": 10.0, "causes": {c.label: 0.0 for c in Cause} | {"bubble": 4.0}}}
    loss = {
        "name": "equal layers (pp2)", "account": account, "mended_account": account, "named": True,
        "remedy": "layers 3, 4", "before": 10.0, "after": 12.5, "gain": 1.25, "unit": "output tok/s",
    }  # fmt: skip
    said = page["planted"]("equal layers", Cause.BUBBLE)({"losses": [loss]})
    assert "40% of the device time" in said and "1.25 times." in said and "layers 3, 4" in said
