"""GET /served: what runs, and the lengths and times of the requests just served: enough to simulate them again.

Lengths only: nothing of what a client said or was answered, and no name of a request.
"""

from typing import Any

from fastapi import APIRouter, Request
from msgspec import Struct
from starlette.responses import Response

from evener.brain import BrainConfig
from evener.execute.base import Engine
from evener.execute.served import Served
from evener.ledger.account import Account
from evener.ledger.ledger import Ledger
from evener.serve.errors import json_response
from evener.serve.front import VERSION, Front
from evener.serve.query import declare_parameters, parameters, seconds_of
from evener.serve.wire import declare
from evener.spec.cluster import Cluster
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan
from evener.units import NS_PER_S, Nanoseconds, ns

FORMAT = 2
"""Of the answer; raised with every change that an older reader would misunderstand."""
PARAMETERS = {"window": "Requests that ended in the last so many seconds; without it, all that are kept."}


class ServedRequest(Struct, frozen=True, kw_only=True):
    """One request, in lengths. Times are seconds after the ledger's start; None: not yet, or never."""

    arrived_s: float
    """At the engine."""
    first_token_s: float | None
    ended_s: float | None
    cancelled_s: float | None
    """When the client left."""
    prompt_tokens: int
    cached_tokens: int
    """Of the prompt: found in the prefix cache."""
    max_tokens: int
    output_tokens: int
    finish: str
    """`stop`, `length`, `cancelled`, the code of a refusal, or `unfinished`."""
    priority: int


class LostDevice(Struct, frozen=True):
    """A device whose worker was lost."""

    device: str
    at_s: float
    """After the ledger's start."""


class ServedView(Struct, frozen=True, kw_only=True):
    """What runs, and what it had to serve."""

    format: int
    version: str
    """Evener's."""
    name: str
    """The first served model name."""
    model: ModelSpec
    plan: Plan
    cluster: Cluster
    kv_blocks: list[int]
    """Per replica."""
    brain: BrainConfig
    """Limits and policies."""
    costs: dict[str, Any]
    """What the cost model was made from."""
    now_s: float
    """Seconds after the ledger's start, as all times here."""
    since_s: float
    """Where the window begins."""
    keeps: int | None
    """The newest so many requests are kept."""
    cut: str
    """Why the window begins later than it was asked for; empty if it does not."""
    requests: list[ServedRequest]
    """In order of arrival: those that ended in the window."""
    around: list[ServedRequest]
    """What ran beside them, but ended before the window or runs still."""
    lost: list[LostDevice]
    account: Account
    """From the first arrival to the end of the last of `requests`."""


def router(front: Front) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()
    described = declare(ServedView)
    declare_parameters(described, PARAMETERS)

    @routes.get("/served", **described)
    async def served(request: Request) -> Response:
        """What runs, and the lengths and times of what it has just served."""
        given = parameters(request, "/served", PARAMETERS)
        window = seconds_of(given, "window") if "window" in given else None
        return json_response(view(front.engine, front.config.served_model_names[0], window))

    return routes


def _reach(kept: Ledger, asked: Nanoseconds) -> Nanoseconds:
    """The earliest window from `asked` on that the ledger has checkpoints for. Totals since the start are always there,
    so a nanosecond later is asked for."""
    later = Nanoseconds(max(asked, kept.start + 1))
    first = Nanoseconds(kept.start + ns(kept.account(later).since_s))
    return first if first > later else asked


def view(engine: Engine, name: str, window: float | None) -> ServedView:
    """What /served answers; `window` in seconds. Raises Unavailable where no ledger is kept."""
    kept, log = engine.ledger(), engine.served()
    header = log.header
    asked = kept.start if window is None else Nanoseconds(max(kept.start, kept.now - ns(window)))
    since = max(asked, log.complete_since, _reach(kept, asked))
    cut = ""
    if since > asked:
        least = f"its newest {log.keep} requests" if since == log.complete_since else "that much of its ledger"
        cut = f"the server keeps {least}, the last {(kept.now - since) / NS_PER_S:.0f} s"
    ended, beside = log.since(since)
    first = ended[0].arrived if ended else since
    last = max((r.ended for r in ended if r.ended is not None), default=since)

    def s(at: Nanoseconds | None) -> float | None:
        return None if at is None else (at - kept.start) / NS_PER_S

    def lengths(r: Served) -> ServedRequest:
        return ServedRequest(
            arrived_s=(r.arrived - kept.start) / NS_PER_S,
            first_token_s=s(r.first),
            ended_s=s(r.ended),
            cancelled_s=s(r.cancelled),
            prompt_tokens=r.request.prompt_len,
            cached_tokens=r.cached,
            max_tokens=r.request.max_tokens,
            output_tokens=r.tokens,
            finish=r.finish,
            priority=r.request.priority,
        )

    return ServedView(
        format=FORMAT,
        version=VERSION,
        name=name,
        model=header.model,
        plan=header.plan,
        cluster=header.cluster,
        kv_blocks=header.kv_blocks,
        brain=header.brain,
        costs=header.costs,
        now_s=(kept.now - kept.start) / NS_PER_S,
        since_s=(since - kept.start) / NS_PER_S,
        keeps=log.keep,
        cut=cut,
        requests=[lengths(r) for r in ended],
        around=[lengths(r) for r in beside],
        lost=[LostDevice(x.device, (x.at - kept.start) / NS_PER_S) for x in log.lost],
        account=kept.account(first, last),
    )
