"""`evener`: one file per verb, put together here. Errors of the drawn tree become one clear line and an exit code."""

import sys

import typer

from evener.cli.bench import bench
from evener.cli.compare import compare
from evener.cli.devices import devices
from evener.cli.ledger import ledger
from evener.cli.plan import plan
from evener.cli.quality import quality
from evener.cli.replay import replay
from evener.cli.serve import serve
from evener.cli.simulate import simulate
from evener.cli.verify import verify
from evener.errors import EvenerError

app = typer.Typer(
    name="evener",
    help="One language model, served live over several, possibly unlike, devices.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(serve)
app.command()(devices)
app.command()(plan)
app.command()(simulate)
app.command()(bench)
app.command()(compare)
app.command()(replay)
app.command()(ledger)
app.command()(verify)
app.command()(quality)


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
