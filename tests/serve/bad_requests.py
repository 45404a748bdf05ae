"""Requests that must be refused, as data: what is sent, and the status and code that must come back.

`benchmarks/bad_requests.py` sends the same list to a running server. `MODEL` stands for the served name,
`OVER` for one token id beyond the vocabulary, `LONG` for more tokens than the context holds.
"""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

COMPLETIONS = "/v1/completions"
CHAT = "/v1/chat/completions"
JSON = "application/json"
USER = [{"role": "user", "content": "hi"}]


class BadRequest(NamedTuple):
    """One request, and what must come back."""

    name: str
    path: str
    body: bytes
    status: int
    code: str
    param: str | None = None
    method: str = "POST"
    content_type: str | None = JSON


class Server(NamedTuple):
    """What the list must know of the server it is for."""

    model: str
    vocab: int
    max_model_len: int
    max_top_logprobs: int
    max_body_bytes: int


def bad_requests(server: Server) -> Iterator[BadRequest]:
    """All of them."""
    value, unsupported, too_long = "invalid_value", "unsupported_parameter", "context_length_exceeded"

    def completion(name: str, code: str, param: str | None, status: int = 400, **fields: Any) -> BadRequest:
        body = {"model": server.model, "prompt": "hi", "max_tokens": 4, **fields}
        return BadRequest(name, COMPLETIONS, json.dumps(body).encode(), status, code, param)

    def chat(name: str, code: str, param: str | None, status: int = 400, **fields: Any) -> BadRequest:
        body = {"model": server.model, "messages": USER, "max_tokens": 4, **fields}
        return BadRequest(name, CHAT, json.dumps(body).encode(), status, code, param)

    def raw(name: str, body: bytes, status: int = 400, code: str = value, **other: Any) -> BadRequest:
        return BadRequest(name, other.pop("path", COMPLETIONS), body, status, code, **other)

    named = json.dumps(server.model).encode()

    # ---- the body as such
    yield raw("empty body", b"")
    yield raw("not JSON", b"hello")
    yield raw("truncated JSON", b'{"model": ')
    yield raw("array instead of object", b"[1, 2]")
    yield raw("number instead of object", b"7")
    yield raw("NaN in JSON", b'{"prompt": "hi", "temperature": NaN}')
    yield raw("number beyond doubles", b'{"prompt": "hi", "temperature": 1e999}')
    yield raw("nested too deeply", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}")
    yield raw("nested within the parser's limit", b'{"prompt": ' + b"[" * 800 + b"]" * 800 + b"}", param="prompt[0][0]")
    yield raw("integer of 5000 digits", b'{"prompt": "hi", "seed": ' + b"9" * 5000 + b"}")
    yield raw("integer of 4000 digits", b'{"prompt": [' + b"9" * 4000 + b"]}", param="prompt")
    yield raw("invalid UTF-8", b'{"prompt": "\xff\xfe"}')
    yield raw("lone surrogate", b'{"prompt": "half a pair: \\ud800 and text"}')
    yield raw("body over the limit", b'{"prompt": "' + b"a" * server.max_body_bytes + b'"}', 413, "body_too_large")
    yield raw("form instead of JSON", b"prompt=hi", 415, "unsupported_media_type",
              content_type="application/x-www-form-urlencoded")  # fmt: skip
    yield raw("no content type", b'{"prompt": "hi"}', 415, "unsupported_media_type", content_type=None)

    # ---- where to
    yield raw("wrong method", b"", 405, "method_not_allowed", method="GET")
    yield raw("wrong method, models", b"{}", 405, "method_not_allowed", path="/v1/models", method="DELETE")
    yield raw("unknown path", b"{}", 404, "not_found", path="/v1/embeddings")
    yield raw("unknown model, GET", b"", 404, "model_not_found", path="/v1/models/gpt-9", method="GET", param="model")
    yield completion("unknown model", "model_not_found", "model", 404, model="gpt-9")
    yield chat("unknown model, chat", "model_not_found", "model", 404, model="")
    yield completion("model of wrong type", value, "model", model=3)

    # ---- prompts
    yield raw("no prompt", b'{"model": ' + named + b"}", param="prompt")
    yield completion("prompt null", value, "prompt", prompt=None)
    yield completion("prompt a number", value, "prompt", prompt=5)
    yield completion("prompt an object", value, "prompt", prompt={"text": "hi"})
    yield completion("prompt an empty text", value, "prompt", prompt="")
    yield completion("prompt an empty list", value, "prompt", prompt=[])
    yield completion("prompt with an empty list", value, "prompt", prompt=[[1], []])
    yield completion("prompt of mixed kinds", value, "prompt", prompt=["hi", 3])
    yield completion("prompt with a fraction", value, "prompt[1]", prompt=[1, 2.5])
    yield completion("token id beyond the vocabulary", value, "prompt", prompt=[1, server.vocab])
    yield completion("negative token id", value, "prompt", prompt=[-1])
    yield completion("token id beyond 64 bits", value, "prompt", prompt=[2**70])
    yield completion("prompt too long", too_long, "prompt", prompt=[5] * (server.max_model_len + 1))
    yield completion("prompt fills the context", too_long, "prompt", prompt=[5] * server.max_model_len)
    yield completion("prompt plus max_tokens too long", too_long, "prompt", max_tokens=server.max_model_len)
    yield completion("too many sequences", value, "n", prompt=["hi"] * 200, n=128)
    yield chat("no messages", value, "messages", messages=[])
    yield chat("messages a text", value, "messages", messages="hi")
    yield chat("message a text", value, "messages[0]", messages=["hi"])
    yield chat("message without content", value, "messages[0].content", messages=[{"role": "user"}])
    yield chat("content a number", value, "messages[0].content", messages=[{"role": "user", "content": 1}])
    yield chat("unknown role", value, "messages[0].role", messages=[{"role": "robot", "content": "hi"}])
    yield chat("tool message", unsupported, "messages[0].role", messages=[{"role": "tool", "content": "4"}])
    yield chat("image part", unsupported, "messages[0].content",
               messages=[{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}])  # fmt: skip
    yield chat("conversation too long", too_long, "messages",
               messages=[{"role": "user", "content": "why? " * server.max_model_len}])  # fmt: skip
    yield chat("opened and continued", value, "continue_final_message",
               add_generation_prompt=True, continue_final_message=True)  # fmt: skip
    yield chat("renderer argument smuggled in", value, "chat_template_kwargs", chat_template_kwargs={"tokenize": True})

    # ---- parameters
    for name, bad in [
        ("temperature", -0.1), ("temperature", "hot"), ("temperature", True), ("top_p", 0), ("top_p", 1.5),
        ("top_k", -2), ("top_k", 1.5), ("min_p", -0.5), ("min_p", 2), ("repetition_penalty", 0),
        ("presence_penalty", 3), ("frequency_penalty", -2.5), ("seed", "x"), ("seed", 2**64), ("n", 0), ("n", 129),
        ("n", True), ("max_tokens", -1), ("max_tokens", 10**30), ("max_tokens", "many"), ("max_tokens", 0),
        ("logprobs", -1), ("logprobs", True), ("logprobs", server.max_top_logprobs + 1), ("stop", 3), ("stop", ""),
        ("stop", ["a"] * 17), ("stop_token_ids", [server.vocab]), ("stream", "yes"), ("echo", 1), ("priority", 1.5),
        ("user", 5), ("metadata", {"a": 1}), ("stream_options", {"include_usage": True}), ("ignore_eos", "no"),
    ]:  # fmt: skip
        yield completion(f"{name}={json.dumps(bad)[:24]}", value, name, **{name: bad})
    yield completion("unknown stream option", value, "stream_options", stream=True, stream_options={"usage": True})
    yield chat("max_completion_tokens=0", value, "max_completion_tokens", max_completion_tokens=0)
    yield chat("two caps that disagree", value, "max_completion_tokens", max_completion_tokens=5)
    yield chat("top_logprobs without logprobs", value, "top_logprobs", top_logprobs=2)
    yield chat("top_logprobs too many", value, "top_logprobs", logprobs=True, top_logprobs=server.max_top_logprobs + 1)
    yield chat("logprobs a number", value, "logprobs", logprobs=3)
    yield completion("misspelt field", value, "temprature", temprature=1)
    yield completion("unknown field", value, "frobnicate", frobnicate=1)

    # ---- known, and refused by name
    for name, asked in [
        ("best_of", 3), ("suffix", "end"), ("logit_bias", {"5": 10}), ("min_tokens", 3), ("use_beam_search", True),
        ("response_format", {"type": "json_object"}), ("prompt_logprobs", 1), ("structured_outputs", {"json": {}}),
    ]:  # fmt: skip
        yield completion(f"{name} asked for", unsupported, name, **{name: asked})
    for name, asked in [
        ("tools", [{"type": "function", "function": {"name": "f"}}]), ("tool_choice", "required"),
        ("functions", [{"name": "f"}]), ("audio", {"voice": "alloy"}), ("modalities", ["text", "audio"]),
        ("echo", True), ("reasoning_effort", "high"), ("response_format", {"type": "json_schema", "json_schema": {}}),
    ]:  # fmt: skip
        yield chat(f"{name} asked for, chat", unsupported, name, **{name: asked})

    # ---- the other endpoints
    yield raw("tokenize nothing", b"{}", path="/tokenize", param="prompt")
    yield raw("tokenize a number", b'{"prompt": 3}', path="/tokenize", param="prompt")
    yield raw("detokenize a text", b'{"tokens": "abc"}', path="/detokenize", param="tokens")
    beyond = json.dumps({"tokens": [server.vocab]}).encode()
    yield raw("detokenize beyond the vocabulary", beyond, path="/detokenize", param="tokens")
