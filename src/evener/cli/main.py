"""`evener`: one file per verb, put together here. Errors of the drawn tree become one clear line and an exit code.

A verb's module is imported when it is asked for: `evener ledger` needs no torch and should not wait for it.
"""

import sys
from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

from evener.errors import EvenerError

VERBS = ("serve", "devices", "plan", "simulate", "bench", "compare", "replay", "ledger", "verify", "quality")
"""Each is the function of that name in `evener.cli.<verb>`."""


class _Verbs(TyperGroup):
    """Finds a verb by importing its module."""

    def list_commands(self, ctx: Any) -> list[str]:
        """In the order of `VERBS`."""
        return list(VERBS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """The verb; None if there is none of that name."""
        if cmd_name not in VERBS:
            return None
        if cmd_name not in self.commands:
            single = typer.Typer(add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP)
            single.command(cmd_name)(getattr(import_module(f"evener.cli.{cmd_name}"), cmd_name))
            self.commands[cmd_name] = typer.main.get_command(single)
        return self.commands[cmd_name]


_HELP = {"help_option_names": ["-h", "--help"]}

app = typer.Typer(
    name="evener",
    cls=_Verbs,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings=_HELP,
)


@app.callback()
def _about() -> None:
    """One language model, served live over several, possibly unlike, devices."""


def main() -> None:
    """Entry point of the console script."""
    try:
        app()
    except EvenerError as error:
        print(f"evener: {error.message}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("evener: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output left, as `head` does
        sys.stderr.close()
        sys.exit(0)
