"""/ledger and its counters in /metrics, over a ledger that was told a short story."""

import asyncio
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from fake import FakeEngine
from ledger_story import ns, told_engine

from evener.ledger.spans import Milestone

pytestmark = pytest.mark.anyio
Client = httpx2.AsyncClient


@pytest.fixture
def engine() -> FakeEngine:
    return told_engine()


@pytest.fixture
def client(engine: FakeEngine, http: Callable[..., Client]) -> Client:
    return http(engine)


async def get(client: Client, **params: Any) -> dict[str, Any]:
    reply = await client.get("/ledger", params=params)
    assert reply.status_code == 200, reply.text
    return reply.json()  # type: ignore[no-any-return]


async def test_all_of_it(client: Client) -> None:
    body = await get(client)
    assert body["verdict"]["findings"] and body["verdict"]["bound"]
    assert body["window_s"] == 10 and body["now_s"] == 10 and body["requests"] is None
    device = body["devices"]["cpu:0"]
    causes = {name: s for name, s in device["causes"].items() if s}
    assert causes == {"down": 2, "no_demand": 6, "host": 0.25, "prefill": 1, "contended": 0.5, "transfer": 0.25}
    assert sum(device["causes"].values()) == device["wall_s"] == 10


async def test_windows(client: Client) -> None:
    assert (await get(client, since=0, until=2))["devices"]["cpu:0"]["causes"]["down"] == pytest.approx(2)
    last = await get(client, window=5)
    assert last["since_s"] == 5 and last["devices"]["cpu:0"]["causes"]["no_demand"] == pytest.approx(5)


async def test_a_request_by_its_id(client: Client) -> None:
    [one] = (await get(client, request="cmpl-1"))["requests"]
    assert one["request_id"] == "cmpl-1-0" and one["ended"] and one["arrived_s"] == 3 and one["latency_s"] == 2
    assert (await get(client, requests="true"))["requests"] == [one]


async def test_many_requests_leave_the_server_its_turns(engine: FakeEngine, client: Client) -> None:
    """What each request's latency went into takes a millisecond; results and new batches do not wait for all."""
    for k in range(200):
        for what in (Milestone.ARRIVED, Milestone.ENDED):
            engine.ledger().request(f"many-{k}", 0, ns(20), what, 1)
    turns = 0

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    task = asyncio.create_task(others())
    assert len((await get(client, requests="1"))["requests"]) == 201
    task.cancel()
    assert turns > 200


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("windw=5", "windw"), ("window=x", "window"), ("window=-1", "window"), ("window=nan", "window"),
        ("window=5&since=1", "window"), ("window=5&window=6", "window"), ("requests=maybe", "requests"),
        ("request=nobody", "request"), ("trace=1&requests=1", "trace"), ("since=2&until=1", None),
    ],
)  # fmt: skip
async def test_what_it_refuses(client: Client, query: str, param: str | None) -> None:
    reply = await client.get(f"/ledger?{query}")
    assert reply.status_code == 400, reply.text
    assert reply.json()["error"]["param"] == param


async def test_counters(client: Client) -> None:
    text = (await client.get("/metrics")).text
    line = 'evener_device_seconds_total{cause="contended",device="cpu:0",model_name="tiny",replica="0",stage="0"} 0.5'
    assert line in text.splitlines()
    assert any(x.startswith("evener_transfer_bytes_total") and x.endswith(" 3000.0") for x in text.splitlines())


async def test_no_ledger(engine: FakeEngine, client: Client) -> None:
    engine.kept = None
    reply = await client.get("/ledger")
    assert reply.status_code == 503 and "--no-ledger" in reply.json()["error"]["message"]
    assert "evener_device_seconds" not in (await client.get("/metrics")).text


async def test_a_trace(client: Client) -> None:
    events = (await get(client, trace=1))["traceEvents"]
    assert {e["name"] for e in events if e["ph"] == "i"} == {"arrived", "admitted", "first_token", "ended"}
