"""GET /health: 200 while requests can be served, else 503 with the reason and the remedy."""

from fastapi import APIRouter
from msgspec import Struct
from starlette.responses import Response

from evener.execute.base import ReplicaStatus
from evener.serve.errors import json_response
from evener.serve.front import Front
from evener.serve.wire import declare, ref


class Health(Struct, frozen=True):
    """Whether the server answers, and each replica's state."""

    status: str
    """`ok`, `degraded` (some replica is down, the others serve) or `unavailable`."""
    reason: str
    replicas: list[ReplicaStatus]
    warnings: list[str]
    """What went wrong beside serving: a recording or a ledger that stopped."""


def router(front: Front) -> APIRouter:
    """The endpoint; needs no API key."""
    routes = APIRouter()
    described = declare(Health)
    described["responses"][503] = {"description": "Down", "content": {"application/json": {"schema": ref(Health)}}}

    @routes.get("/health", **described)
    async def health() -> Response:
        """Ready or not, and why not."""
        status = front.engine.status()
        down = [f"replica {r.replica} is down: {r.reason}" for r in status.replicas if not r.alive]
        word = "unavailable" if not status.ready else "degraded" if down else "ok"
        if down:
            down.append(
                "restart the server to get it back" if len(down) == 1 else "restart the server to get them back"
            )
        body = Health(word, status.reason or "; ".join(down), list(status.replicas), list(status.warnings))
        return json_response(body, 200 if status.ready else 503)

    return routes
