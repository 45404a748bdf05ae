"""Cases of a comparison from the command line or a YAML file: `name: flags`, the flags those of an engine.

fcfs: -tp 2 --policy fcfs
uneven:                          # the same as a mapping; `tp`, `pp` and `dp` stand for -tp, -pp, -dp
  tp: 2
  devices: cpu:0 cpu:1,slowdown=2
"""

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import typer
import yaml
from msgspec import structs
from typer.main import get_command

from evener.api import EngineOptions
from evener.cli.engine_options import said, with_engine_options
from evener.errors import InvalidInput
from evener.workload.compare import Case

_UsageError: type[Exception] = typer.BadParameter.__bases__[0]
"""What an unknown flag raises; some versions of typer bring their own click, and export this one child of it."""


def read_cases(
    texts: Sequence[str], file: Path | None, base: EngineOptions, base_said: Iterable[str] = ()
) -> list[Case]:
    """Cases in the order given, the file's first; what a case does not say is as in `base`, where `base_said` was said.

    Raises InvalidInput for a name given twice, a flag that engines do not have, or a file that is no such mapping.
    """
    cases = []
    for name, flags in [*_of_file(file), *map(_split, texts)]:
        found = _options(name, flags)
        cases.append(Case(name, structs.replace(base, **found), frozenset({*base_said, *found})))
    names = [c.name for c in cases]
    if len(set(names)) < len(names):
        twice = next(n for n in names if names.count(n) > 1)
        raise InvalidInput(f"two cases are called {twice!r}; give each a name of its own")
    return cases


def _split(text: str) -> tuple[str, list[str]]:
    name, colon, flags = text.partition(":")
    if not colon or not name.strip():
        raise InvalidInput(f"--case {text!r}: write 'NAME: FLAGS', as in 'pipeline: -pp 2 --policy fcfs'")
    return name.strip(), _words(name.strip(), flags)


def _words(name: str, flags: str) -> list[str]:
    try:
        return shlex.split(flags)
    except ValueError as error:
        raise InvalidInput(f"case {name!r}: {flags!r}: {error}; balance the quotes") from error


def _of_file(file: Path | None) -> Iterable[tuple[str, list[str]]]:
    if file is None:
        return
    try:
        raw = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the cases {file}: {error}; give a readable YAML file") from error
    except yaml.YAMLError as error:
        raise InvalidInput(f"{file} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(raw, dict) or not raw:
        raise InvalidInput(f"{file} is no mapping of names to flags; write lines like 'pipeline: -pp 2'")
    for name, flags in raw.items():
        if isinstance(flags, dict):
            yield str(name), [word for key, value in flags.items() for word in _flag(str(key), value)]
        elif isinstance(flags, str) or flags is None:
            yield str(name), _words(str(name), flags or "")
        else:
            raise InvalidInput(f"{file}: case {name!r} is {flags!r}; write flags as a text or a mapping")


def _flag(key: str, value: Any) -> list[str]:
    key = key.replace("_", "-")
    flag = f"-{key}" if key in ("tp", "pp", "dp") else f"--{key}"
    if isinstance(value, bool):
        return [flag if value else f"--no-{key}"]
    return [word for one in (value if isinstance(value, list) else [value]) for word in (flag, str(one))]


def _options(name: str, flags: list[str]) -> dict[str, Any]:
    """What the flags say."""
    app = typer.Typer(add_completion=False)
    found: dict[str, Any] = {}

    def case(options: EngineOptions, ctx: typer.Context) -> None:
        found.update({key: getattr(options, key) for key in said(ctx)})

    app.command()(with_engine_options(case))
    try:
        get_command(app).main(flags, prog_name=name, standalone_mode=False)
    except _UsageError as error:
        raise InvalidInput(f"case {name!r}: {error.format_message()}") from error  # type: ignore[attr-defined]
    return found
