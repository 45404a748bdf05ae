"""/served: what runs, and the lengths of what was served; never a word of it."""

from collections.abc import Callable
from typing import Any

import httpx2
import msgspec
import pytest
from fake import FakeEngine
from served_story import LENGTHS, MS, asked, busy_engine

from evener.engine.events import Arrived, WorkerDown
from evener.engine.request import Request
from evener.serve.served import FORMAT, ServedView
from evener.units import Nanoseconds

pytestmark = pytest.mark.anyio
Client = httpx2.AsyncClient
Http = Callable[..., Client]


async def get(client: Client, **params: Any) -> ServedView:
    reply = await client.get("/served", params=params)
    assert reply.status_code == 200, reply.text
    return msgspec.convert(reply.json(), ServedView)


async def test_what_runs_and_what_it_served(http: Http) -> None:
    engine = busy_engine()
    said = await get(http(engine))
    assert (said.format, said.name) == (FORMAT, "tiny")
    assert (said.plan, said.model, said.kv_blocks) == (engine.plan, engine.model, [100])
    assert said.costs["dtype"] == "fp32" and said.brain.max_num_seqs == 64
    assert [(r.prompt_tokens, r.output_tokens, r.finish) for r in said.requests] == [(i, o, "stop") for i, o in LENGTHS]
    assert [r.arrived_s for r in said.requests] == pytest.approx([1 + 0.002 * k for k in range(len(LENGTHS))])
    for r in said.requests:
        assert r.first_token_s is not None and r.ended_s is not None and r.arrived_s < r.first_token_s <= r.ended_s
    assert (said.around, said.lost, said.cut, said.keeps) == ([], [], "", 8)
    first, last = said.requests[0].arrived_s, max(r.ended_s or 0 for r in said.requests)
    assert (said.account.since_s, said.account.until_s) == pytest.approx((first, last))


async def test_lengths_only(http: Http) -> None:
    """No token, no name that a client knows, no path of this host; neither in the answer nor in memory."""
    engine = busy_engine()
    text = (await http(engine).get("/served")).text
    assert "secret" not in text and "somebody" not in text
    for kept in engine.log.requests:
        assert (
            kept.request.prompt is None and kept.request.block_keys is None and "secret" not in kept.request.request_id
        )


async def test_a_window_and_what_ran_beside_it(http: Http) -> None:
    """Counted is what ended in the window; what ran meanwhile is told too."""
    engine = busy_engine([asked(0, 0, 60, 2), asked(1, 0.01, 60, 30), asked(2, 5000, 20, 4), asked(3, 5000.01, 30, 30)])
    assert engine.kept is not None
    ends = [r.ended for r in engine.log.requests]
    since = (engine.kept.now - ends[1]) / 1e9  # type: ignore[operator]
    said = await get(http(engine), window=since + 1e-6)
    assert [r.prompt_tokens for r in said.requests] == [60, 20, 30] and [r.output_tokens for r in said.around] == [2]
    said = await get(http(engine), window=4)
    assert [r.prompt_tokens for r in said.requests] == [20, 30] and said.around == []
    engine.log.step(Nanoseconds(5000 * MS + 20_000), Arrived(Request("late", 7, 9)), [])
    said = await get(http(engine), window=4)
    assert [(r.prompt_tokens, r.finish, r.ended_s) for r in said.around] == [(7, "unfinished", None)]


async def test_memory_is_bounded_and_a_cut_is_told(http: Http) -> None:
    """Of 20 requests a second apart, with room for 8: the newest 8, and the window begins where they do."""
    engine = busy_engine([asked(k, 1000 * k, 16, 2) for k in range(20)])
    said = await get(http(engine))
    assert len(engine.log.requests) == len(said.requests) == 8
    assert "keeps its newest 8 requests" in said.cut and said.since_s == pytest.approx(11, abs=0.5)
    assert (await get(http(engine), window=5.5)).cut == ""


async def test_losses_failures_and_leavers(http: Http) -> None:
    engine = busy_engine([asked(0, 0, 20, 30, leaves_ms=1), asked(1, 0, 30, 3)])
    engine.log.step(Nanoseconds(2 * MS), WorkerDown("cpu:0", "gone"), [])
    said = await get(http(engine))
    left, done = said.requests
    assert left.finish == "cancelled" and left.cancelled_s == pytest.approx(0.001) and done.finish == "stop"
    assert [(x.device, x.at_s) for x in said.lost] == [("cpu:0", 0.002)]


async def test_nothing_served_yet(http: Http) -> None:
    said = await get(http(FakeEngine()))
    assert said.requests == [] and said.account.window_s == 0


@pytest.mark.parametrize(
    ("query", "param"), [("windw=5", "windw"), ("window=x", "window"), ("window=1&window=2", "window")]
)
async def test_what_it_refuses(http: Http, query: str, param: str) -> None:
    reply = await http(FakeEngine()).get(f"/served?{query}")
    assert reply.status_code == 400 and reply.json()["error"]["param"] == param


async def test_access_is_that_of_the_ledger(http: Http) -> None:
    """The key, if there is one; and a ledger, whose shares belong to the answer."""
    locked = http(busy_engine(), api_key="k")
    assert (await locked.get("/served")).status_code == 401
    assert (await locked.get("/served", headers={"authorization": "Bearer k"})).status_code == 200
    engine = busy_engine()
    engine.kept = None
    reply = await http(engine).get("/served")
    assert reply.status_code == 503 and "--no-ledger" in reply.json()["error"]["message"]
