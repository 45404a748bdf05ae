"""Everything around the two generating endpoints: bad input, keys, models, tokens, health, metrics."""

from collections.abc import Callable

import httpx2
import pytest
from fake import MODEL, VOCAB, FakeEngine, ids
from openai import AsyncOpenAI, AuthenticationError, NotFoundError

from bad_requests import BadRequest, Server, bad_requests
from evener.errors import InvalidInput
from evener.serve.front import FrontConfig

pytestmark = pytest.mark.anyio
Http = Callable[..., httpx2.AsyncClient]
Client = Callable[..., AsyncOpenAI]
LIMIT = 300_000
BAD = list(bad_requests(Server(MODEL, VOCAB, 256, 5, LIMIT)))


async def send(http: httpx2.AsyncClient, bad: BadRequest) -> httpx2.Response:
    headers = {} if bad.content_type is None else {"content-type": bad.content_type}
    return await http.request(bad.method, bad.path, content=bad.body, headers=headers)


def test_there_are_enough_bad_requests() -> None:
    assert len(BAD) >= 40
    assert len({b.name for b in BAD}) == len(BAD)


@pytest.mark.parametrize("bad", BAD, ids=lambda b: b.name)
async def test_bad_request_gets_openai_error(http: Http, bad: BadRequest) -> None:
    engine = FakeEngine()
    async with http(engine, max_body_bytes=LIMIT) as client:
        response = await send(client, bad)
    assert response.headers["content-type"] == "application/json"
    assert set(response.json()) == {"error"}
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert (response.status_code, error["code"], error["param"]) == (bad.status, bad.code, bad.param)
    assert error["type"] == "invalid_request_error"
    assert 10 < len(error["message"]) < 600
    assert not engine.submitted


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"n": 0}, "n=0: expected int >= 1"),
        ({"temperature": "hot"}, 'temperature="hot": expected float, got str'),
        ({"temprature": 1}, "unknown field 'temprature'; did you mean 'temperature'?"),
        ({"prompt": [1, VOCAB]}, f"prompt[1]={VOCAB} is not a token id; ids are 0 to {VOCAB - 1}"),
        ({"logit_bias": {"1": 2}}, "logit_bias is not supported by this server; leave it out"),
        ({"logprobs": 6}, "logprobs=6 is more than this server keeps; ask for at most 5"),
        ({"model": "x"}, f'model "x" is not served here; served: {MODEL}, alias/of-it'),
    ],
)
async def test_message_names_value_limit_and_remedy(http: Http, body: dict[str, object], message: str) -> None:
    async with http(FakeEngine()) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi", **body})
    assert response.json()["error"]["message"] == message


async def test_body_limit_holds_while_reading(http: Http) -> None:
    sent = 0

    async def endless() -> "object":
        nonlocal sent
        while sent < 10**9:
            sent += 10_000
            yield b" " * 10_000

    async with http(FakeEngine(), max_body_bytes=50_000) as client:
        response = await client.post("/v1/completions", content=endless(), headers={"content-type": "application/json"})
    assert response.status_code == 413
    # The in-process transport reads the body part by part, on demand.
    assert sent <= 70_000


async def test_compressed_body_is_refused(http: Http) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    async with http(FakeEngine()) as client:
        response = await client.post("/v1/completions", content=b"x", headers=headers)
    assert response.status_code == 415


async def test_an_unforeseen_error_is_500_without_detail(http: Http) -> None:
    engine = FakeEngine(fail_after=(0, KeyError("secret")))
    async with http(engine) as client:
        response = await client.post("/v1/completions", json={"prompt": "hi"})
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert "secret" not in response.text


async def test_api_key(client: Client, http: Http) -> None:
    engine = FakeEngine()
    assert (await client(engine, key="right", api_key="right").models.list()).data
    for key in ("wrong", "rightt", "r"):
        with pytest.raises(AuthenticationError) as caught:
            await client(engine, key=key, api_key="right").models.list()
        assert caught.value.code == "invalid_api_key"
    async with http(engine, api_key="right") as plain:
        assert (await plain.get("/v1/models")).status_code == 401
        assert (await plain.get("/metrics")).status_code == 401
        assert (await plain.get("/v1/models", headers={"authorization": b"Bearer \xff\xfe"})).status_code == 401
        assert (await plain.get("/health")).status_code == 200


async def test_models(client: Client) -> None:
    api = client(FakeEngine())
    assert [m.id for m in (await api.models.list()).data] == [MODEL, "alias/of-it"]
    model = await api.models.retrieve("alias/of-it")
    assert (model.object, model.owned_by, model.root, model.max_model_len) == ("model", "evener", MODEL, 256)
    done = await api.completions.create(model="alias/of-it", prompt="hi")
    assert done.model == "alias/of-it"
    with pytest.raises(NotFoundError):
        await api.models.retrieve("gpt-9")


async def test_tokenize_and_back(http: Http) -> None:
    async with http(FakeEngine()) as client:
        got = (await client.post("/tokenize", json={"prompt": "the fox", "return_token_strs": True})).json()
        assert got["tokens"] == ids("the fox")
        assert (got["count"], got["max_model_len"]) == (len(got["tokens"]), 256)
        assert "".join(got["token_strs"]) == "the fox"
        back = await client.post("/detokenize", json={"tokens": got["tokens"]})
        assert back.json() == {"prompt": "the fox"}
        messages = [{"role": "user", "content": "hi"}]
        chat = (await client.post("/tokenize", json={"messages": messages, "model": MODEL})).json()
        assert chat["tokens"] == ids("<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n")
        assert chat["token_strs"] is None
        empty = (await client.post("/tokenize", json={"prompt": ""})).json()
        assert (empty["count"], empty["tokens"]) == (0, [])


async def test_health_tells_why_not(http: Http) -> None:
    engine = FakeEngine()
    async with http(engine) as client:
        good = await client.get("/health")
        assert (good.status_code, good.json()["status"]) == (200, "ok")
        engine.down = "worker cpu:0 lost: killed"
        bad = await client.get("/health")
        assert (bad.status_code, bad.json()["status"]) == (503, "unavailable")
        assert bad.json()["reason"] == "worker cpu:0 lost: killed; restart the server"


async def test_metrics(http: Http) -> None:
    engine = FakeEngine()
    async with http(engine) as client:
        await client.post("/v1/completions", json={"prompt": "hi", "max_tokens": 3, "n": 2})
        await client.post("/v1/completions", json={"prompt": "hi", "n": 0})
        await client.get("/no/such/path")
        text = (await client.get("/metrics")).text
        version = (await client.get("/version")).json()["version"]
    label = f'model_name="{MODEL}"'
    for line in (
        f'evener_num_requests_running{{{label},replica="0"}} 0.0',
        f'evener_kv_cache_usage_perc{{{label},replica="0"}} 0.0',
        f'evener_generation_tokens_total{{{label},replica="0"}} 6.0',
        f'evener_request_success_total{{finished_reason="length",{label}}} 2.0',
        f"evener_time_to_first_token_seconds_count{{{label}}} 2.0",
        f"evener_request_time_per_output_token_seconds_count{{{label}}} 2.0",
        f"evener_e2e_request_latency_seconds_count{{{label}}} 2.0",
        'evener_http_requests_total{path="/v1/completions",status="200"} 1.0',
        'evener_http_requests_total{path="/v1/completions",status="400"} 1.0',
        'evener_http_requests_total{path="other",status="404"} 1.0',
    ):
        assert line in text.splitlines(), line
    assert version[0].isdigit()


@pytest.mark.parametrize(
    "settings",
    [
        {"served_model_names": ()},
        {"served_model_names": ("",)},
        {"api_key": ""},
        {"allowed_origins": ("localhost:3000",)},
        {"allowed_origins": ("http://a/path",)},
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, object]) -> None:
    with pytest.raises(InvalidInput, match="give"):
        FrontConfig(**{"served_model_names": (MODEL,), "eos_token_ids": (1,), **settings})


async def test_request_id_is_the_clients_or_the_answers(client: Client, http: Http) -> None:
    api = client(FakeEngine())
    done = await api.completions.create(model=MODEL, prompt="hi")
    assert done.id == f"cmpl-{done._request_id}" and len(done._request_id) == 24
    chat = await api.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "hi"}])
    assert chat.id == f"chatcmpl-{chat._request_id}" != f"chatcmpl-{done._request_id}"
    mine = await api.completions.create(model=MODEL, prompt="hi", extra_headers={"X-Request-Id": "trace/7"})
    assert mine._request_id == "trace/7" and "trace" not in mine.id
    async with http(FakeEngine(), api_key="right") as plain:
        for headers, status in (({}, 401), ({"authorization": "Bearer right"}, 200)):
            answer = await plain.get("/v1/models", headers={**headers, "x-request-id": "trace-8"})
            assert (answer.status_code, answer.headers["x-request-id"]) == (status, "trace-8")
        for bad in (b"a" * 129, b"two words", b"\xff"):
            answer = await plain.get("/health", headers=[(b"x-request-id", bad)])
            assert len(answer.headers["x-request-id"]) == 24


async def test_web_pages_read_answers_only_where_their_origin_is_allowed(http: Http) -> None:
    page = {"origin": "http://localhost:3000"}
    preflight = {**page, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    body = {"prompt": "hi"}
    async with http(FakeEngine()) as closed:
        answer = await closed.post("/v1/completions", json=body, headers=page)
        assert "access-control-allow-origin" not in answer.headers
        assert (await closed.options("/v1/completions", headers=preflight)).status_code == 405
    async with http(FakeEngine(), allowed_origins=(page["origin"],), api_key="right") as opened:
        asked = await opened.options("/v1/completions", headers=preflight)  # without the key, as browsers do
        assert (asked.status_code, asked.headers["access-control-allow-origin"]) == (200, page["origin"])
        key = {"authorization": "Bearer right"}
        answer = await opened.post("/v1/completions", json=body, headers={**page, **key})
        assert (answer.status_code, answer.headers["access-control-allow-origin"]) == (200, page["origin"])
        other = await opened.post("/v1/completions", json=body, headers={"origin": "http://evil.example", **key})
        assert "access-control-allow-origin" not in other.headers
        refused = await opened.post("/v1/completions", json=body, headers=page)
        assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, page["origin"])
