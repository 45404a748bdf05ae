"""Writes docs/measurements.md from the tables and machines under results/."""

import json

from common import RESULTS, ROOT
from run import benchmarks, headline

TARGET = ROOT / "docs" / "measurements.md"


def main() -> None:
    out = [
        "# Measurements",
        "",
        "Written by `python benchmarks/report.py` from what the scripts in `benchmarks/` left in `results/`.",
        "The machines are shared and noisy: read ratios within a table, not single figures.",
        "",
    ]
    for name, script in benchmarks().items():
        table = RESULTS / f"{name}.md"
        if not table.exists():
            continue
        machine = json.loads((RESULTS / f"{name}.json").read_text())["machine"]
        where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}, {machine['when'][:10]}"
        out += [f"## {headline(script)}", "", f"`benchmarks/{name}.py`; {where}.", "", table.read_text()]
    TARGET.write_text("\n".join(out))
    print(f"wrote {TARGET.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
