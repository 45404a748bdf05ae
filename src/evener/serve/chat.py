"""POST /v1/chat/completions: OpenAI's chat."""

import inspect
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Annotated, Any, Literal, Protocol

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import UNSET, Meta, Struct, UnsetType, field
from starlette.responses import Response
from transformers import PreTrainedTokenizerBase

from evener.errors import InvalidRequest, UnsupportedParameter
from evener.serve.errors import json_response
from evener.serve.fields import read_json, refuse, shown, to_record
from evener.serve.front import Front
from evener.serve.generation import Delta, Generation, TokenText
from evener.serve.params import MAX_TOKENS, GenerationFields, check_length, check_model, check_top_logprobs
from evener.serve.sse import CLIENT_LEFT, DONE, ClientLeft, EventStream, begin, event, until_left
from evener.serve.vocabulary import Vocabulary
from evener.serve.wire import Usage, declare, new_id, usage

RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {"messages"}
"""Names that chat_template_kwargs may not set: they are arguments of the renderer, not of the template."""


ROLES = ("system", "developer", "user", "assistant")


class TextPart(Struct, frozen=True, kw_only=True):
    """A part of a message; images, audio and files are refused by name."""

    type: str
    text: str = ""


class Message(Struct, frozen=True, kw_only=True):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Meta(min_length=1)]


class Conversation(Protocol):
    """Fields that say how messages become a prompt; /tokenize has them too (msgspec records cannot mix in)."""

    messages: list[Message]
    add_generation_prompt: bool | None
    continue_final_message: bool
    add_special_tokens: bool
    chat_template_kwargs: dict[str, Any]


class ChatRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    messages: Annotated[list[Message], Meta(min_length=1)]
    add_generation_prompt: bool | None = None
    """Open the assistant's turn. Absent: true, unless continue_final_message."""
    continue_final_message: bool = False
    """Leave the last message open and write on."""
    add_special_tokens: bool = False
    """Templates write their own."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """Further variables of the template."""

    max_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    max_completion_tokens: Annotated[int, Meta(ge=1, le=MAX_TOKENS)] | None = None
    """The newer name of max_tokens. Both absent: the rest of the context."""
    logprobs: bool = False
    top_logprobs: Annotated[int, Meta(ge=0)] | None = None


class TopLogprob(Struct, frozen=True):
    """A token and its natural-log probability."""

    token: str
    logprob: float
    bytes: list[int]
    """The token's UTF-8, which may be part of a character."""


class TokenLogprob(Struct, frozen=True):
    """The chosen token and its likeliest rivals."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(Struct, frozen=True):
    """One entry per token of the content."""

    content: list[TokenLogprob]
    refusal: None = None


class AssistantMessage(Struct, frozen=True):
    """The answer's text."""

    content: str
    role: str = "assistant"
    refusal: None = None


class ChatChoice(Struct, frozen=True):
    """One answer."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class ChatCompletion(Struct, frozen=True):
    """The answer."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    object: str = "chat.completion"


class ChatDelta(Struct, frozen=True):
    """What a chunk adds."""

    role: str | UnsetType = UNSET
    content: str | UnsetType = UNSET


class ChunkChoice(Struct, frozen=True):
    """One choice's share of a chunk."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | UnsetType | None = UNSET


class ChatChunk(Struct, frozen=True):
    """One event of a stream."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "chat.completion.chunk"


def router(front: Front) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/chat/completions", **declare(ChatCompletion, ChatRequest, chunk=ChatChunk))
    async def chat(request: HttpRequest) -> Response:
        """Answer a conversation."""
        arrived = time.perf_counter()
        raw = await read_json(request, front.config.max_body_bytes)
        check_messages(raw)
        body = to_record(raw, ChatRequest)
        check_model(body.model, front.config.served_model_names)
        body.check(front.engine.model.vocab)
        if body.top_logprobs is not None:
            if not body.logprobs:
                raise InvalidRequest("top_logprobs needs logprobs=true; set it", "top_logprobs")
            check_top_logprobs(body.top_logprobs, front.engine.max_top_logprobs, "top_logprobs")
        prompt = await chat_prompt(front, body)
        max_tokens = check_length(len(prompt), _wanted(body), None, front.engine.max_model_len, "messages")
        request_id = new_id("chatcmpl")
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        choices = front.choices(request_id, [prompt], [max_tokens], body, logprobs=logprobs)
        generation = Generation(front.engine, front.metrics, choices, arrived)
        writer = _Writer(front, body, request_id, generation)
        try:
            if not body.stream:
                return json_response(await until_left(request.receive, writer.whole()))
            source = generation.deltas()
            return EventStream(writer.frames(await begin(request.receive, source)), source)
        except ClientLeft:
            return Response(status_code=CLIENT_LEFT)

    return routes


def check_messages(raw: dict[str, Any]) -> None:
    """Refuse by name what messages may hold elsewhere: tools, images, names. Drops fields that ask for nothing."""
    messages = raw.get("messages")
    if not isinstance(messages, list):
        return  # the typed record says what is wrong
    known = {"role", "content"}
    for k, message in enumerate(messages):
        if not isinstance(message, dict):
            return
        where, role = f"messages[{k}].", message.get("role")
        if role in ("tool", "function"):
            raise UnsupportedParameter(
                f"{where}role={shown(role)} is not supported by this server; roles are {', '.join(ROLES)}",
                f"{where}role",
            )
        if isinstance(role, str) and role not in ROLES:
            raise InvalidRequest(f"{where}role={shown(role)} is unknown; roles are {', '.join(ROLES)}", f"{where}role")
        for name in [n for n in message if n not in known]:
            value = message.pop(name)
            if value is None or value == []:
                continue  # as in a message of OpenAI's client sent back: refusal, tool_calls, annotations ...
            if name in _MESSAGE_REFUSED:
                raise UnsupportedParameter(f"{where}{name} is not supported by this server; leave it out", where + name)
            refuse(name, value, known, where)
        content = message.get("content")
        for j, part in enumerate(content if isinstance(content, list) else []):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind != "text":
                raise UnsupportedParameter(
                    f"{where}content[{j}].type={shown(kind)} is not supported by this server; use 'text'",
                    f"{where}content",
                )


_MESSAGE_REFUSED = {"name", "tool_calls", "tool_call_id", "function_call", "refusal", "reasoning", "reasoning_content",
                    "audio", "annotations"}  # fmt: skip


async def chat_prompt(front: Front, body: Conversation) -> list[int]:
    """Tokens of the rendered conversation. Raises InvalidRequest or ContextTooLong."""
    if body.add_generation_prompt and body.continue_final_message:
        raise InvalidRequest(
            "add_generation_prompt and continue_final_message exclude each other; set one", "continue_final_message"
        )
    if taken := sorted(RESERVED & body.chat_template_kwargs.keys()):
        raise InvalidRequest(
            f"chat_template_kwargs may not set {', '.join(taken)}; use the request field of that name, if there is one",
            "chat_template_kwargs",
        )
    opens = body.add_generation_prompt
    options = {
        "add_generation_prompt": not body.continue_final_message if opens is None else opens,
        "continue_final_message": body.continue_final_message,
        **body.chat_template_kwargs,
    }
    messages = [{"role": m.role, "content": _text(m)} for m in body.messages]
    return await front.encode(front.render_chat(messages, options), body.add_special_tokens, "messages")


def _text(message: Message) -> str:
    """Text parts are joined by newlines, as vLLM does."""
    content = message.content
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


def _wanted(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"max_completion_tokens={new} and max_tokens={old} disagree; give one of them", "max_completion_tokens"
        )
    return old if new is None else new


class _Writer:
    """Makes the wire format from deltas."""

    def __init__(self, front: Front, body: ChatRequest, request_id: str, generation: Generation) -> None:
        self._front = front
        self._body = body
        self._id = request_id
        self._generation = generation
        self._created = int(time.time())
        self._model = body.model or front.config.served_model_names[0]

    async def whole(self) -> ChatCompletion:
        """The complete answer, choices in order."""
        parts: dict[int, list[Delta]] = {c.index: [] for c in self._generation.choices}
        async with aclosing(self._generation.deltas()) as deltas:
            async for delta in deltas:
                parts[delta.choice].append(delta)
        choices = []
        for index, pieces in parts.items():
            message = AssistantMessage("".join(p.text for p in pieces))
            logprobs = self._logprobs([t for p in pieces for t in p.tokens])
            choices.append(ChatChoice(index, message, logprobs, pieces[-1].finish, pieces[-1].stop_reason))
        return ChatCompletion(self._id, self._created, self._model, self._front.fingerprint, choices, self._usage())

    async def frames(self, deltas: AsyncGenerator[Delta, None]) -> AsyncGenerator[bytes, None]:
        """The events of a stream: for each choice its role, its text, its end."""
        options = self._body.stream_options
        include = options is not None and options.include_usage
        running = options is not None and options.continuous_usage_stats

        def chunk(choice: ChunkChoice) -> bytes:
            so_far = self._usage() if running else None if include else UNSET
            return event(self._chunk([choice], so_far))

        begun: set[int] = set()
        async with aclosing(deltas):
            async for delta in deltas:
                index = delta.choice
                if index not in begun:
                    begun.add(index)
                    yield chunk(ChunkChoice(index, ChatDelta("assistant", ""), None, None))
                if delta.text or delta.tokens:
                    logprobs = self._logprobs(delta.tokens)
                    yield chunk(ChunkChoice(index, ChatDelta(content=delta.text), logprobs, None))
                if delta.finish is not None:
                    yield chunk(ChunkChoice(index, ChatDelta(), None, delta.finish, delta.stop_reason))
        if include:
            yield event(self._chunk([], self._usage()))
        yield DONE

    def _usage(self) -> Usage:
        return usage(self._generation.choices, self._body.n)

    def _chunk(self, choices: list[ChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self._id, self._created, self._model, self._front.fingerprint, choices, usage)

    def _logprobs(self, tokens: list[TokenText]) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        vocabulary, wanted = self._front.vocabulary, self._body.top_logprobs or 0
        content = []
        for _, entry in tokens:
            rivals = [_top(vocabulary, token, logprob) for token, logprob in entry.top[:wanted]]
            chosen = _top(vocabulary, entry.token, entry.logprob)
            content.append(TokenLogprob(chosen.token, chosen.logprob, chosen.bytes, rivals))
        return ChatLogprobs(content)


def _top(vocabulary: Vocabulary, token: int, logprob: float) -> TopLogprob:
    return TopLogprob(vocabulary.label(token), logprob, list(vocabulary.bytes_of(token)))
