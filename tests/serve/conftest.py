"""An OpenAI client whose requests go straight into the app, without a socket."""

from collections.abc import Callable

import httpx2
import pytest
from fake import EOS, MODEL, FakeEngine, tiny_tokenizer
from openai import AsyncOpenAI

from evener.serve.app import create_app
from evener.serve.front import FrontConfig


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


def http_client(engine: FakeEngine, **settings: object) -> httpx2.AsyncClient:
    config = FrontConfig(**{"served_model_names": (MODEL, "alias/of-it"), "eos_token_ids": (EOS,), **settings})
    app = create_app(engine, tiny_tokenizer(), config)
    transport = httpx2.ASGITransport(app, raise_app_exceptions=False)
    return httpx2.AsyncClient(transport=transport, base_url="http://evener")


@pytest.fixture
def client() -> Callable[..., AsyncOpenAI]:
    """`client(engine, **FrontConfig fields)`."""

    def make(engine: FakeEngine, key: str = "none", **settings: object) -> AsyncOpenAI:
        http = http_client(engine, **settings)
        return AsyncOpenAI(api_key=key, base_url="http://evener/v1", http_client=http, max_retries=0)

    return make


@pytest.fixture
def http() -> Callable[..., httpx2.AsyncClient]:
    """`http(engine, **FrontConfig fields)`: plain HTTP."""
    return http_client
