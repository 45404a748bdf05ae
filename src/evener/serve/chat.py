"""POST /v1/chat/completions: OpenAI's chat."""

import time
from collections.abc import Iterator
from typing import Annotated, Any

from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import UNSET, Meta, Struct, UnsetType, field
from starlette.responses import Response

from evener.errors import InvalidRequest
from evener.serve.answer import Writer, accept
from evener.serve.fields import read_json
from evener.serve.front import Front
from evener.serve.generation import Delta, Generation, TokenText
from evener.serve.messages import Message, chat_prompt, check_messages
from evener.serve.params import MAX_TOKENS, GenerationFields, check_length, check_top_logprobs
from evener.serve.vocabulary import Vocabulary
from evener.serve.wire import Usage, declare


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
        body = accept(front, raw, ChatRequest)
        if body.top_logprobs is not None:
            if not body.logprobs:
                raise InvalidRequest("top_logprobs needs logprobs=true; set it", "top_logprobs")
            check_top_logprobs(body.top_logprobs, front.engine.max_top_logprobs, "top_logprobs")
        prompt = await chat_prompt(front, body)
        max_tokens = check_length(len(prompt), _wanted(body), None, front.engine.max_model_len, "messages")
        request_id = f"chatcmpl-{request.state.id}"
        logprobs = (body.top_logprobs or 0) if body.logprobs else None
        choices = front.choices(request_id, [prompt], [max_tokens], body, logprobs=logprobs)
        generation = Generation(front.engine, front.metrics, choices, arrived)
        return await _ChatWriter(front, body, request_id, generation).respond(request)

    return routes


def _wanted(body: ChatRequest) -> int | None:
    new, old = body.max_completion_tokens, body.max_tokens
    if new is not None and old is not None and new != old:
        raise InvalidRequest(
            f"max_completion_tokens={new} and max_tokens={old} disagree; give one of them", "max_completion_tokens"
        )
    return old if new is None else new


class _ChatWriter(Writer[ChatRequest, ChunkChoice]):
    """Chat's wire format; a stream gives each choice its role, its text, its end."""

    def __init__(self, front: Front, body: ChatRequest, request_id: str, generation: Generation) -> None:
        super().__init__(front, body, request_id, generation)
        self._begun: set[int] = set()

    async def whole(self) -> ChatCompletion:
        choices = []
        for index, deltas in (await self.collected()).items():
            message = AssistantMessage("".join(d.text for d in deltas))
            logprobs = self._logprobs([t for d in deltas for t in d.tokens])
            choices.append(ChatChoice(index, message, logprobs, deltas[-1].finish, deltas[-1].stop_reason))
        return ChatCompletion(self.request_id, self.created, self.model, self.front.fingerprint, choices, self.usage())

    def parts(self, delta: Delta) -> Iterator[ChunkChoice]:
        index = delta.choice
        if index not in self._begun:
            self._begun.add(index)
            yield ChunkChoice(index, ChatDelta("assistant", ""), None, None)
        if delta.text or delta.tokens:
            yield ChunkChoice(index, ChatDelta(content=delta.text), self._logprobs(delta.tokens), None)
        if delta.finish is not None:
            yield ChunkChoice(index, ChatDelta(), None, delta.finish, delta.stop_reason)

    def chunk(self, choices: list[ChunkChoice], usage: Usage | UnsetType | None) -> ChatChunk:
        return ChatChunk(self.request_id, self.created, self.model, self.front.fingerprint, choices, usage)

    def _logprobs(self, tokens: list[TokenText]) -> ChatLogprobs | None:
        if not self.body.logprobs:
            return None
        vocabulary, wanted = self.front.vocabulary, self.body.top_logprobs or 0
        content = []
        for _, entry in tokens:
            rivals = [_top(vocabulary, token, logprob) for token, logprob in entry.top[:wanted]]
            chosen = _top(vocabulary, entry.token, entry.logprob)
            content.append(TokenLogprob(chosen.token, chosen.logprob, chosen.bytes, rivals))
        return ChatLogprobs(content)


def _top(vocabulary: Vocabulary, token: int, logprob: float) -> TopLogprob:
    return TopLogprob(vocabulary.label(token), logprob, list(vocabulary.bytes_of(token)))
