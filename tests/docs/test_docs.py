"""The documents stay true: every command in the README parses, every linked file exists, docs/cli.md is current."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from evener.cli.main import VERBS, app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BASH = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [line.split("#  ")[0].strip() for line in BASH.splitlines() if line.startswith("evener ")]


def _without_comment(line: str) -> list[str]:
    words = shlex.split(line, comments=False)
    return words[: words.index("#")] if "#" in words else words


@pytest.mark.parametrize("line", COMMANDS)
def test_readme_command_parses(line: str) -> None:
    """The verb exists and knows every option."""
    _, verb, *arguments = _without_comment(line)
    command = get_command(app).get_command(None, verb)  # type: ignore[attr-defined]
    assert command is not None, f"no verb {verb}"
    command.make_context(verb, arguments)  # raises for an unknown option or a value of the wrong type


def test_readme_shows_every_verb() -> None:
    """No verb is hidden from a newcomer."""
    assert set(VERBS) <= {line.split()[1] for line in COMMANDS}


def test_links_exist() -> None:
    """Relative links of the documents lead somewhere."""
    for page in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        for link in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
            if not link.startswith("http"):
                assert (page.parent / link).exists(), f"{page.name}: {link}"


def test_cli_page_is_current() -> None:
    """docs/cli.md is what `--help` says."""
    result = subprocess.run([sys.executable, "docs/make_cli.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
