"""Parts of OpenAI's formats that completions and chat share."""

from typing import Any

import msgspec
from msgspec import Struct

from evener.serve.errors import ErrorBody
from evener.serve.generation import Choice


class PromptTokensDetails(Struct, frozen=True):
    """Where the prompt's tokens came from."""

    cached_tokens: int
    """Found in the prefix cache, not computed again."""


class Usage(Struct, frozen=True):
    """Tokens of one client request, all choices together."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


def usage(choices: list[Choice], n: int) -> Usage:
    """Each prompt counts once, however many (`n`) choices it has; so do its cached tokens."""
    firsts = choices[::n]
    prompt = sum(c.request.prompt_len for c in firsts)
    completion = sum(c.n_tokens for c in choices)
    cached = sum(c.cached_tokens for c in firsts)
    return Usage(prompt, completion, prompt + completion, PromptTokensDetails(cached))


SCHEMAS: list[Any] = []
"""Every record that some endpoint declares; `app` puts them into the OpenAPI document."""


def ref(record: type[Struct]) -> dict[str, Any]:
    """A reference to the record's JSON schema, which is registered."""
    if record not in SCHEMAS:
        SCHEMAS.append(record)
    return {"$ref": f"#/components/schemas/{record.__name__}"}


def declare(
    answer: type[Struct], body: type[Struct] | None = None, chunk: type[Struct] | None = None
) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route: its request body, answers and errors in the OpenAPI document.

    `chunk`: the record in each event, where the answer may be streamed.
    """
    content: dict[str, Any] = {"application/json": {"schema": ref(answer)}}
    if chunk is not None:
        records = [{"type": "string", "contentMediaType": "application/json", "contentSchema": ref(record)}
                   for record in (chunk, ErrorBody)]  # fmt: skip
        data = {"anyOf": [{"const": "[DONE]"}, *records]}
        event = {"type": "object", "properties": {"data": data}, "required": ["data"]}
        content["text/event-stream"] = {"schema": event}
    errors = [400, 401, 404, 413, 415, 429, 500, 503] if body else [401, 404, 500]
    wrong = {"description": "OpenAI's error shape", "content": {"application/json": {"schema": ref(ErrorBody)}}}
    responses = {200: {"description": "OK", "content": content}, **dict.fromkeys(errors, wrong)}
    extra = {}
    if body is not None:
        extra = {"requestBody": {"required": True, "content": {"application/json": {"schema": ref(body)}}}}
    return {"responses": responses, "openapi_extra": extra, "response_model": None}


def components() -> dict[str, Any]:
    """JSON schemas of all declared records and of what they contain."""
    return msgspec.json.schema_components(SCHEMAS, ref_template="#/components/schemas/{name}")[1]
