"""POST /tokenize and /detokenize, in vLLM's shapes."""

from typing import Annotated, Any

from fastapi import APIRouter, Request
from msgspec import Meta, Struct
from starlette.responses import Response

from evener.serve.errors import json_response
from evener.serve.fields import read_json, to_record
from evener.serve.front import Front
from evener.serve.messages import Message, chat_prompt, check_messages
from evener.serve.params import check_model, check_tokens
from evener.serve.wire import declare


class TokenizeText(Struct, kw_only=True, forbid_unknown_fields=True):
    """A text to tokenise."""

    prompt: str
    model: str | None = None
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChat(Struct, kw_only=True, forbid_unknown_fields=True):
    """A conversation to render and tokenise; fields as in `ChatRequest`."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool = False
    add_special_tokens: bool = False
    chat_template_kwargs: dict[str, Any] = {}
    model: str | None = None
    return_token_strs: bool = False


class Tokenized(Struct, frozen=True):
    """The tokens of a prompt."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeRequest(Struct, kw_only=True, forbid_unknown_fields=True):
    """Tokens to decode."""

    tokens: list[int]
    model: str | None = None


class Detokenized(Struct, frozen=True):
    """Their text, special tokens included."""

    prompt: str


def router(front: Front) -> APIRouter:
    """The endpoints."""
    routes = APIRouter()
    described = declare(Tokenized, TokenizeText)
    either = [declare(Tokenized, kind)["openapi_extra"] for kind in (TokenizeText, TokenizeChat)]
    schemas = [extra["requestBody"]["content"]["application/json"]["schema"] for extra in either]
    described["openapi_extra"]["requestBody"]["content"]["application/json"]["schema"] = {"anyOf": schemas}

    @routes.post("/tokenize", **described)
    async def tokenize(request: Request) -> Response:
        """Token ids of a text (`prompt`) or of a conversation (`messages`)."""
        raw = await read_json(request, front.config.max_body_bytes)
        body: TokenizeText | TokenizeChat
        if raw.get("messages") is not None:
            check_messages(raw)
            body = to_record(raw, TokenizeChat)
            check_model(body.model, front.config.served_model_names)
            tokens = await chat_prompt(front, body)
        else:
            body = to_record(raw, TokenizeText)
            check_model(body.model, front.config.served_model_names)
            tokens = await front.encode(body.prompt, body.add_special_tokens, "prompt") if body.prompt else []
        strings = [front.vocabulary.label(t) for t in tokens] if body.return_token_strs else None
        return json_response(Tokenized(len(tokens), front.engine.max_model_len, tokens, strings))

    @routes.post("/detokenize", **declare(Detokenized, DetokenizeRequest))
    async def detokenize(request: Request) -> Response:
        """Text of token ids."""
        raw = await read_json(request, front.config.max_body_bytes)
        body = to_record(raw, DetokenizeRequest)
        check_model(body.model, front.config.served_model_names)
        check_tokens(body.tokens, front.engine.model.vocab, "tokens")
        return json_response(Detokenized(front.vocabulary.decode(body.tokens)))

    return routes
