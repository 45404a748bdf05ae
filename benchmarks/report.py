"""Writes docs/measurements.md from the tables under results/; what was not measured anew stays as it is."""

import json
import re

from common import RESULTS, ROOT
from run import benchmarks, headline

TARGET = ROOT / "docs" / "measurements.md"


def sections(text: str) -> dict[str, list[str]]:
    """Benchmark -> the lines of its section in an earlier report."""
    found = {}
    for part in re.split(r"^(?=## )", text, flags=re.MULTILINE)[1:]:
        script = re.search(r"^`benchmarks/(\w+)\.py`;", part, flags=re.MULTILINE)
        if script:
            found[script[1]] = [*part.rstrip("\n").split("\n"), ""]
    return found


def main() -> None:
    out = [
        "# Measurements",
        "",
        "Written by `python benchmarks/report.py` from what the scripts in `benchmarks/` left in `results/`.",
        "The machines are shared and noisy: read ratios within a table, not single figures.",
        "",
    ]
    kept = sections(TARGET.read_text()) if TARGET.exists() else {}
    for name, script in benchmarks().items():
        table = RESULTS / f"{name}.md"
        if not table.exists():
            out += kept.get(name, [])
            continue
        machine = json.loads((RESULTS / f"{name}.json").read_text())["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {machine['when'][:10]}"
        out += [f"## {headline(script)}", "", f"`benchmarks/{name}.py`; {where}.", "", table.read_text()]
    TARGET.write_text("\n".join(out))
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
