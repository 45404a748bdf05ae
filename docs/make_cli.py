"""Writes docs/cli.md from the commands themselves. `--check` exits 1 if the file is not up to date."""

import os
import sys
from pathlib import Path

os.environ |= {"TERMINAL_WIDTH": "140", "COLUMNS": "140", "NO_COLOR": "1", "TERM": "dumb"}

from typer.testing import CliRunner

from evener.cli.main import VERBS, app

TARGET = Path(__file__).parent / "cli.md"


def text() -> str:
    """The whole page."""
    out = ["# Commands", "", "Written by `python docs/make_cli.py`.", ""]
    for name in sorted(VERBS):
        result = CliRunner().invoke(app, [name, "--help"], terminal_width=140)
        lines = [line.rstrip() for line in result.stdout.strip("\n").splitlines()]
        out += [f"## evener {name}", "", "```text", *lines, "```", ""]
    return "\n".join(out)


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == text() else "docs/cli.md is out of date: run python docs/make_cli.py")
    TARGET.write_text(text())
