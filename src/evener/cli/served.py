"""A run to set a prediction beside: what a server has just served, by its URL, or a recording."""

from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from evener.cli.server import Server
from evener.engine.request import Request
from evener.errors import InvalidInput, Unavailable
from evener.execute.served import Header, Served
from evener.execute.sim.traffic import Failure, SlowDown
from evener.ledger.account import Account
from evener.serve.front import VERSION
from evener.serve.served import FORMAT, ServedRequest, ServedView
from evener.units import Nanoseconds, ns
from evener.workload.backtest import Traffic, others_took, others_took_on_average, period, read_log
from evener.workload.replay import replay

LONGEST_S = 1e9


class Run(Struct, frozen=True):
    """Traffic, and where the device time went meanwhile."""

    model: str
    source: str
    """URL or file."""
    traffic: Traffic
    account: Account
    """Of the traffic's period."""
    took: list[SlowDown]
    """How much longer the devices took because others had their cores: of a recording each second, else on average."""
    cut: str = ""
    """Why less was found than was asked for."""


def read_run(source: str, window: float | None, api_key: str | None) -> Run:
    """The requests that ended in the last `window` seconds; None: all that are kept.

    Raises Unavailable for a server that does not answer, keeps no ledger or is of another version, InvalidInput where
    there is nothing to compare.
    """
    if window is not None and not 0 < window <= LONGEST_S:
        raise InvalidInput(
            f"--window {window:g} is no number of seconds above 0 and up to {LONGEST_S:g}; give one, or none"
        )
    if source.startswith(("http://", "https://")):
        run = _of_server(Server(source, api_key, timeout_s=60.0), window)
    elif Path(source).is_file():
        run = _of_recording(Path(source), window)
    else:
        raise InvalidInput(
            f"--check {source!r} is neither the URL of a server (like http://127.0.0.1:8000) nor a recorded file"
        )
    if not any(r.finish in ("stop", "length") and r.first is not None for r in run.traffic.requests):
        when = f"in its last {window:g} s" if window is not None else "so far"
        running, failed = len(run.traffic.around), len(run.traffic.requests)
        longer = ", or give a longer --window" if window is not None else ""
        raise InvalidInput(
            f"{run.source} completed no request {when} ({running} still run, {failed} failed or were cancelled); send "
            f"requests and wait for their answers{longer}"
        )
    return run


def _of_server(server: Server, window: float | None) -> Run:
    body = server.get("/served", {} if window is None else {"window": str(window)})
    view = _view(body, server.url)
    header = Header(
        format=view.format, evener=view.version, started=Nanoseconds(0), model=view.model, model_name=view.name,
        plan=view.plan, cluster=view.cluster, kv_blocks=view.kv_blocks, brain=view.brain, costs=view.costs,
    )  # fmt: skip
    requests, around = ([_served(r, f"{kind}{k}") for k, r in enumerate(rs)]
                        for kind, rs in (("r", view.requests), ("a", view.around)))  # fmt: skip
    failures = [Failure(x.device, ns(x.at_s)) for x in view.lost]
    took = others_took_on_average(view.account, Nanoseconds(0))
    return Run(view.name, server.url, Traffic(header, requests, failures, around), view.account, took, view.cut)


def _view(body: Any, url: str) -> ServedView:
    """What it is of is looked at before the rest, which another version may have changed."""
    said = body if isinstance(body, dict) else {}
    version, format = said.get("version"), said.get("format")
    if (version, format) != (VERSION, FORMAT):
        raise Unavailable(
            f"{url} is Evener {version} (format {format} of /served), this is {VERSION} (format {FORMAT}), and another "
            "version may schedule otherwise; check it with the version that serves"
        )
    try:
        return msgspec.convert(body, ServedView)
    except msgspec.ValidationError as error:
        raise Unavailable(f"{url}/served is not what Evener {VERSION} answers ({error}); what runs there?") from error


def _served(r: ServedRequest, name: str) -> Served:
    def at(seconds: float | None) -> Nanoseconds | None:
        return None if seconds is None else ns(seconds)

    return Served(
        request=Request(name, r.prompt_tokens, r.max_tokens, priority=r.priority),
        arrived=ns(r.arrived_s),
        first=at(r.first_token_s),
        tokens=r.output_tokens,
        ended=at(r.ended_s),
        finish=r.finish,
        cancelled=at(r.cancelled_s),
        cached=r.cached_tokens,
    )


def _of_recording(path: Path, window: float | None) -> Run:
    log, again = read_log(path), replay(path)
    if again.difference is not None:
        raise InvalidInput(f"{path} does not replay to the same decisions; `evener replay {path}` shows where")
    if again.ledger is None:
        raise InvalidInput(f"{path} has no ledger to compare with; record without --no-ledger")
    start = log.header.started
    requests, around = log.since(start if window is None else Nanoseconds(max(start, log.now - ns(window))))
    traffic = Traffic(log.header, requests, [Failure(*lost) for lost in log.lost], around)
    account = again.ledger.account(*period(traffic)) if requests else again.ledger.account()
    took = others_took(traffic, again) if requests else []
    return Run(Path(log.header.model_name).name, str(path), traffic, account, took)
