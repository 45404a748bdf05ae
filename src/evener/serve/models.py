"""GET /v1/models: what is served, and GET /version."""

from fastapi import APIRouter
from msgspec import Struct
from starlette.responses import Response

from evener.serve.errors import json_response
from evener.serve.front import VERSION, Front
from evener.serve.params import check_model
from evener.serve.wire import declare


class Model(Struct, frozen=True):
    """A served name."""

    id: str
    created: int
    root: str
    """The first served name, of which the others are aliases."""
    max_model_len: int
    """Tokens of prompt and answer together, at most."""
    object: str = "model"
    owned_by: str = "evener"
    parent: None = None


class ModelList(Struct, frozen=True):
    """All served names."""

    data: list[Model]
    object: str = "list"


class Version(Struct, frozen=True):
    """Evener's version."""

    version: str


def router(front: Front) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    names = front.config.served_model_names
    models = {name: Model(name, front.started, names[0], front.engine.max_model_len) for name in names}

    @routes.get("/v1/models", **declare(ModelList))
    async def list_models() -> Response:
        """Every name that requests may use."""
        return json_response(ModelList(list(models.values())))

    @routes.get("/v1/models/{model_id:path}", **declare(Model))
    async def get_model(model_id: str) -> Response:
        """One of them."""
        return json_response(models[check_model(model_id, names)])

    @routes.get("/version", **declare(Version))
    async def get_version() -> Response:
        """The server's version."""
        return json_response(Version(VERSION))

    return routes
