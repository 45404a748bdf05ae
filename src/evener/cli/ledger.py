"""`evener ledger`: where the device-seconds of a running server go, live."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.live import Live

from evener.cli.ledger_view import account_view, request_view
from evener.cli.paths import writing
from evener.cli.server import Server
from evener.errors import InvalidInput

LIVE_WINDOW_S = 30.0


def ledger(
    url: Annotated[str, typer.Argument(help="Server, without /v1.")] = "http://127.0.0.1:8000",
    window: Annotated[
        float | None,
        typer.Option(min=0.0, help="Only the last so many seconds.", show_default="live: 30, else all since the start"),
    ] = None,
    once: Annotated[bool, typer.Option("--once", help="Print one table and end.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON and end.")] = False,
    request: Annotated[
        str | None, typer.Option(help="Where the latency of this request went, by the id that the server gave.")
    ] = None,
    trace: Annotated[
        Path | None, typer.Option(help="Write what is kept as a trace for ui.perfetto.dev (or chrome://tracing).")
    ] = None,
    every: Annotated[float, typer.Option(min=0.1, help="Seconds between two refreshes.")] = 1.0,
    api_key: Annotated[
        str | None, typer.Option(envvar="EVENER_API_KEY", show_envvar=True, help="Sent as a bearer token.")
    ] = None,
) -> None:
    """Show where every device-second of a running server goes, and the verdict in words. Ctrl-C ends it."""
    if trace is not None and (as_json or request):
        raise InvalidInput("--trace writes a file of its own; leave out --json and --request")
    asked: dict[str, str] = {}
    if window is not None:
        asked["window"] = str(window)
    if request is not None:
        asked["request"] = request
    server = Server(url, api_key)
    if trace is not None:
        _write(trace, server.get("/ledger", {**asked, "trace": "1"}))
    elif as_json:
        body = server.get("/ledger", asked)
        print(json.dumps(body["requests"] if request is not None else body, indent=1))
    elif request is not None:
        console = Console()
        for found in server.get("/ledger", asked)["requests"]:
            console.print(request_view(found, console.width))
    elif once or not sys.stdout.isatty():
        console = Console()
        console.print(_view(server, asked, console.width))
    else:
        _follow(server, {"window": str(LIVE_WINDOW_S), **asked}, every)


def _view(server: Server, asked: dict[str, str], width: int) -> Any:
    body = server.get("/ledger", asked)
    span = (
        f"the last {body['window_s']:.0f} s" if "window" in asked else f"all {body['window_s']:.0f} s since the start"
    )
    return account_view(body, f"{server.url}, {span}", width)


def _follow(server: Server, asked: dict[str, str], every: float) -> None:
    console = Console()
    view = _view(server, asked, console.width)  # a server that is not there is an error, not an empty screen
    try:
        with Live(view, console=console, auto_refresh=False, screen=False) as live:
            while True:
                time.sleep(every)
                live.update(_view(server, asked, console.width), refresh=True)
    except KeyboardInterrupt:
        return


def _write(path: Path, trace: Any) -> None:
    with writing(path, "--trace"):
        path.write_text(json.dumps(trace))
    print(f"wrote {path} ({len(trace['traceEvents'])} events); open it at https://ui.perfetto.dev", file=sys.stderr)
