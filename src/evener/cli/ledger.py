"""`evener ledger`: where the device-seconds of a running server go, live."""

import json
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import httpx
import typer
from rich.console import Console
from rich.live import Live

from evener.cli.ledger_view import account_view, request_view
from evener.errors import InvalidInput, Unavailable

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
    server = _Server(url, api_key)
    if trace is not None:
        _write(trace, server.get({**asked, "trace": "1"}))
    elif as_json:
        body = server.get(asked)
        print(json.dumps(body["requests"] if request is not None else body, indent=1))
    elif request is not None:
        console = Console()
        for found in server.get(asked)["requests"]:
            console.print(request_view(found, console.width))
    elif once or not sys.stdout.isatty():
        console = Console()
        console.print(_view(server, asked, console.width))
    else:
        _follow(server, {"window": str(LIVE_WINDOW_S), **asked}, every)


class _Server:
    """Asks one server for its ledger."""

    def __init__(self, url: str, api_key: str | None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        if not self.url.startswith(("http://", "https://")):
            raise InvalidInput(f"{url!r} is no URL of a server; write it like http://127.0.0.1:8000")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        try:
            self._client = httpx.Client(headers=headers, timeout=10.0)
            httpx.URL(self.url)
        except (httpx.InvalidURL, ValueError, UnicodeError) as error:
            raise InvalidInput(f"{url!r} is no URL of a server ({error}); write it like http://host:8000") from error

    def get(self, asked: dict[str, str]) -> Any:
        """What /ledger answers. Raises Unavailable or InvalidInput with the remedy."""
        try:
            reply = self._client.get(f"{self.url}/ledger", params=asked)
            body = reply.json()
        except httpx.HTTPError as error:
            raise Unavailable(
                f"no answer from {self.url} ({error or type(error).__name__}); is `evener serve` running there?"
            ) from error
        except ValueError:
            raise Unavailable(f"{self.url}/ledger does not answer JSON; is it an Evener server?") from None
        if reply.status_code == 200:
            return body
        detail = body.get("error") if isinstance(body, dict) else None
        message = detail.get("message") if isinstance(detail, dict) else None
        if reply.status_code == 404 and not (message or "").startswith("request"):
            raise Unavailable(f"{self.url} has no ledger (404); is it an Evener server of this version?")
        if reply.status_code == 401:
            raise InvalidInput(f"{self.url} asks for an API key; give it with --api-key or EVENER_API_KEY")
        if reply.status_code == 400:
            raise InvalidInput(f"{self.url}: {message}")
        raise Unavailable(f"{self.url} answers {reply.status_code}: {message or reply.reason_phrase}")


def _view(server: _Server, asked: dict[str, str], width: int) -> Any:
    body = server.get(asked)
    span = (
        f"the last {body['window_s']:.0f} s" if "window" in asked else f"all {body['window_s']:.0f} s since the start"
    )
    return account_view(body, f"{server.url}, {span}", width)


def _follow(server: _Server, asked: dict[str, str], every: float) -> None:
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
    try:
        path.write_text(json.dumps(trace))
    except OSError as error:
        raise InvalidInput(f"cannot write {path}: {error.strerror}; give a writable path") from error
    print(f"wrote {path} ({len(trace['traceEvents'])} events); open it at https://ui.perfetto.dev", file=sys.stderr)
