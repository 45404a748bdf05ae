"""GET /ledger: where every device-second went, in any window; where requests' latency went."""

import asyncio
from collections.abc import Iterable
from typing import Any

from fastapi import APIRouter, Request
from msgspec import Struct, structs
from starlette.responses import Response

from evener.errors import InvalidRequest
from evener.ledger.account import Account
from evener.ledger.export import chrome_trace
from evener.ledger.ledger import Ledger
from evener.ledger.requests import RequestAccount
from evener.ledger.verdict import Verdict, verdict
from evener.serve.errors import json_response
from evener.serve.front import Front
from evener.serve.query import declare_parameters, parameters, seconds_of
from evener.serve.wire import declare, ref
from evener.units import NS_PER_S, Nanoseconds, ns

PARAMETERS = {
    "window": "The last so many seconds; without it and `since`, all since the start.",
    "since": "Seconds after the ledger's start.",
    "until": "Seconds after the ledger's start; without it, now.",
    "requests": "1: also where the latency of the requests that are followed went.",
    "request": "The same for one request, by the id that the client was given.",
    "trace": "1: instead of an account, what is kept of each batch, as a trace for Perfetto or chrome://tracing.",
}
_YES, _NO = ("1", "true"), ("0", "false")


class PhaseView(Struct, frozen=True, kw_only=True):
    """One part of a request's life."""

    name: str
    """`queued`, `prefill`, `decode` or `requeued`."""
    replica: int
    began_s: float
    """After the ledger's start."""
    seconds: float
    causes: dict[str, float]
    """How the replica's devices spent this time, on average over them, seconds."""


class RequestView(Struct, frozen=True, kw_only=True):
    """Where one request's latency went."""

    request_id: str
    arrived_s: float
    """After the ledger's start."""
    latency_s: float
    """Until its end, or until now."""
    ended: bool
    prompt_tokens: int
    output_tokens: int | None
    """Null while it runs."""
    preempted: int
    moved: int
    phases: list[PhaseView]


class LedgerView(Account, frozen=True, kw_only=True):
    """An account of a window, what it says in words, and the requests asked for."""

    now_s: float
    """Seconds after the ledger's start: what `since` and `until` count in."""
    verdict: Verdict
    requests: list[RequestView] | None = None


def router(front: Front) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()
    described = declare(LedgerView)
    declare_parameters(described, PARAMETERS)
    trace = {"type": "object", "properties": {"traceEvents": {"type": "array"}}, "required": ["traceEvents"]}
    described["responses"][200]["content"]["application/json"]["schema"] = {"anyOf": [ref(LedgerView), trace]}

    @routes.get("/ledger", **described)
    async def ledger(request: Request) -> Response:
        """Where every device-second went."""
        given = _parameters(request)
        kept = front.engine.ledger()
        since, until = _window(given, kept)
        if _flag(given, "trace"):
            if "request" in given or _flag(given, "requests"):
                raise InvalidRequest("a trace holds all requests; leave out requests and request", "trace")
            return json_response(chrome_trace(kept, since, until))
        account = kept.account(since, until)
        return json_response(
            LedgerView(
                **structs.asdict(account),
                now_s=_s(kept, kept.now),
                verdict=verdict(account, front.engine.served().header.hints),
                requests=await _requests(given, kept),
            )
        )

    return routes


def _parameters(request: Request) -> dict[str, str]:
    given = parameters(request, "/ledger", PARAMETERS)
    if "window" in given and ("since" in given or "until" in given):
        raise InvalidRequest("window excludes since and until; give one or the other", "window")
    return given


def _window(given: dict[str, str], kept: Ledger) -> tuple[Nanoseconds | None, Nanoseconds | None]:
    if "window" in given:
        return Nanoseconds(kept.now - ns(seconds_of(given, "window"))), None
    since = Nanoseconds(kept.start + ns(seconds_of(given, "since"))) if "since" in given else None
    until = Nanoseconds(kept.start + ns(seconds_of(given, "until"))) if "until" in given else None
    return since, until


def _flag(given: dict[str, str], name: str) -> bool:
    asked = given.get(name, "0").lower()
    if asked not in _YES + _NO:
        raise InvalidRequest(f"{name}={asked[:64]!r} is not understood; give 1 or 0", name)
    return asked in _YES


async def _requests(given: dict[str, str], kept: Ledger) -> list[RequestView] | None:
    asked = _flag(given, "requests")
    ids: Iterable[str] = kept.requests()
    if (one := given.get("request")) is not None:
        # The choices of a client's request are sequences of their own: <id>-0, <id>-1, ...
        ids = [i for i in ids if i == one or i.rpartition("-")[0] == one]
        if not ids:
            raise InvalidRequest(
                f"request {one[:128]!r} is not followed (any more); GET /ledger?requests=1 lists the newest ones",
                "request",
            )
    elif not asked:
        return None
    views = []
    for i in ids:
        account = kept.request_account(i)
        if account is not None:
            views.append(_view(kept, account))
        # A thousand of them take a second, and batches must go out meanwhile.
        await asyncio.sleep(0)
    return views


def _view(kept: Ledger, r: RequestAccount) -> RequestView:
    ended: int = r.ended if r.ended is not None else kept.now
    return RequestView(
        request_id=r.request_id,
        arrived_s=_s(kept, r.arrived),
        latency_s=(ended - r.arrived) / NS_PER_S,
        ended=r.ended is not None,
        prompt_tokens=r.prompt_tokens,
        output_tokens=r.output_tokens,
        preempted=r.preempted,
        moved=r.moved,
        phases=[
            PhaseView(name=p.name, replica=p.replica, began_s=_s(kept, p.began), seconds=p.seconds, causes=p.causes)
            for p in r.phases
        ],
    )


def _s(kept: Ledger, at: Any) -> float:
    return (int(at) - kept.start) / NS_PER_S
