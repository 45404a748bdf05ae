"""POST /v1/completions: OpenAI's text completions."""

import time
from collections.abc import Iterator
from typing import Annotated

import msgspec
from fastapi import APIRouter
from fastapi import Request as HttpRequest
from msgspec import UNSET, Meta, Struct, UnsetType
from starlette.responses import Response

from evener.engine.batch import TokenLogprobs
from evener.errors import InvalidRequest
from evener.serve.answer import Writer, accept
from evener.serve.detokenize import Detokenizer
from evener.serve.fields import read_json, shown
from evener.serve.front import Front
from evener.serve.generation import Delta, Generation, TokenText
from evener.serve.params import MAX_TOKENS, GenerationFields, check_length, check_tokens, check_top_logprobs
from evener.serve.vocabulary import Vocabulary
from evener.serve.wire import Usage, declare

DEFAULT_MAX_TOKENS = 16


class CompletionRequest(GenerationFields, kw_only=True, forbid_unknown_fields=True):
    """The body."""

    prompt: str | Annotated[list[str | int | list[int]], Meta(min_length=1)]
    """A text, texts, token ids, or lists of token ids."""
    max_tokens: Annotated[int, Meta(ge=0, le=MAX_TOKENS)] | None = None
    """Absent: 16, or what the context leaves. 0 needs echo."""
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    """Alternatives per token; 0: the chosen token's only."""
    echo: bool = False
    """The prompt before the answer, with its logprobs if those are asked for."""
    add_special_tokens: bool = True


class CompletionLogprobs(Struct, frozen=True):
    """Four lists with one entry per token. The first token of an echoed prompt has no probability: null."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]
    """Characters of this choice's `text` before the token."""


class CompletionChoice(Struct, frozen=True):
    """One answer, or what a stream adds to it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: str | None
    stop_reason: int | str | None


class Completion(Struct, frozen=True):
    """The answer; a stream's chunks look the same."""

    id: str
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | UnsetType | None = UNSET
    object: str = "text_completion"


def router(front: Front) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.post("/v1/completions", **declare(Completion, CompletionRequest, chunk=Completion))
    async def complete(request: HttpRequest) -> Response:
        """Continue a prompt, or several."""
        arrived = time.perf_counter()
        body = accept(front, await read_json(request, front.config.max_body_bytes), CompletionRequest)
        if body.logprobs is not None:
            check_top_logprobs(body.logprobs, front.engine.max_top_logprobs, "logprobs")
        if body.max_tokens == 0 and not body.echo:
            raise InvalidRequest("max_tokens=0 asks for nothing without echo; give at least 1", "max_tokens")
        texts, prompts = await _prompts(front, body)
        limit = front.engine.max_model_len
        max_tokens = [check_length(len(p), body.max_tokens, DEFAULT_MAX_TOKENS, limit, "prompt") for p in prompts]
        request_id = f"cmpl-{request.state.id}"
        prompt_logprobs = body.logprobs if body.echo else None
        choices = front.choices(
            request_id, prompts, max_tokens, body, logprobs=body.logprobs, prompt_logprobs=prompt_logprobs
        )
        generation = Generation(front.engine, front.metrics, choices, arrived)
        echoes = [_Echo(front.vocabulary, t, p) for t, p in zip(texts, prompts, strict=True)] if body.echo else None
        return await _CompletionWriter(front, body, request_id, generation, echoes).respond(request)

    return routes


async def _prompts(front: Front, body: CompletionRequest) -> tuple[list[str], list[list[int]]]:
    """Text and tokens of each prompt. Raises InvalidRequest or ContextTooLong naming the prompt."""
    given = body.prompt
    vocab = front.engine.model.vocab
    if isinstance(given, str):
        given = [given]
    kinds = {type(item) for item in given}
    if len(kinds) > 1:
        raise InvalidRequest(
            f"prompt={shown(given)} mixes kinds; give a text, texts, token ids, or lists of token ids", "prompt"
        )
    if kinds == {int}:
        given = [given]  # type: ignore[list-item]
    texts, prompts = [], []
    for k, item in enumerate(given):
        where = "prompt" if len(given) == 1 else f"prompt[{k}]"
        if isinstance(item, str):
            texts.append(item)
            prompts.append(await front.encode(item, body.add_special_tokens, where))
            continue
        assert isinstance(item, list)
        if not item:
            raise InvalidRequest(f"{where} is empty; give at least one token", "prompt")
        check_tokens(item, vocab, where)
        texts.append(front.vocabulary.decode(item) if body.echo else "")
        prompts.append(item)
    return texts, prompts


class _Echo:
    """A prompt as the beginning of its answers."""

    def __init__(self, vocabulary: Vocabulary, text: str, tokens: list[int]) -> None:
        self.text = text
        self.tokens = tokens
        # Special tokens that the tokenizer added by itself (BOS) are no part of the client's text.
        detokenizer = Detokenizer(vocabulary, skip_special_tokens=vocabulary.decode(tokens) != text)
        self.offsets = []
        for token in tokens:
            self.offsets.append(min(detokenizer.decoded, len(text)))
            detokenizer.feed(token)


class _CompletionWriter(Writer[CompletionRequest, CompletionChoice]):
    """The wire format of completions; the chunks of a stream look like the whole answer."""

    def __init__(
        self,
        front: Front,
        body: CompletionRequest,
        request_id: str,
        generation: Generation,
        echoes: list[_Echo] | None,
    ) -> None:
        super().__init__(front, body, request_id, generation)
        self._echoes = echoes
        self._begun: set[int] = set()

    async def whole(self) -> Completion:
        choices = []
        for index, deltas in (await self.collected()).items():
            pieces = [self._choice(d) for d in deltas]
            text = "".join(p.text for p in pieces)
            logprobs = _joined([p.logprobs for p in pieces if p.logprobs])
            if logprobs is None and self.body.logprobs is not None:
                logprobs = CompletionLogprobs([], [], [], [])
            choices.append(CompletionChoice(index, text, logprobs, pieces[-1].finish_reason, pieces[-1].stop_reason))
        return self.chunk(choices, self.usage())

    def parts(self, delta: Delta) -> Iterator[CompletionChoice]:
        yield self._choice(delta)

    def chunk(self, choices: list[CompletionChoice], usage: Usage | UnsetType | None) -> Completion:
        return Completion(self.request_id, self.created, self.model, self.front.fingerprint, choices, usage)

    def _choice(self, delta: Delta) -> CompletionChoice:
        wanted = self.body.logprobs
        echo = self._echoes[delta.choice // self.body.n] if self._echoes is not None else None
        text, logprobs = delta.text, None
        if wanted is not None and delta.tokens:
            shift = len(echo.text) if echo is not None else 0
            logprobs = self._logprobs(delta.tokens, shift, wanted)
        if echo is not None and delta.choice not in self._begun:
            self._begun.add(delta.choice)
            text = echo.text + text
            if wanted is not None:
                entries = zip(echo.offsets[1:], delta.prompt_logprobs or [], strict=True)
                prompt = self._logprobs([TokenText(at, entry) for at, entry in entries], 0, wanted)
                first = CompletionLogprobs([self.front.vocabulary.label(echo.tokens[0])], [None], [None], [0])
                logprobs = _joined([first, prompt, *([logprobs] if logprobs else [])])
        return CompletionChoice(delta.choice, text, logprobs, delta.finish, delta.stop_reason)

    def _logprobs(self, tokens: list[TokenText], shift: int, wanted: int) -> CompletionLogprobs:
        label = self.front.vocabulary.label

        def top(entry: TokenLogprobs) -> dict[str, float]:
            """The alternatives, and the chosen token even where it is not among them; likelier ones win a label."""
            found: dict[str, float] = {}
            for token, logprob in [*entry.top[:wanted], (entry.token, entry.logprob)]:
                found.setdefault(label(token), logprob)
            return found

        return CompletionLogprobs(
            [label(t.logprobs.token) for t in tokens],
            [t.logprobs.logprob for t in tokens],
            [top(t.logprobs) for t in tokens],
            [t.offset + shift for t in tokens],
        )


def _joined(parts: list[CompletionLogprobs]) -> CompletionLogprobs | None:
    if len(parts) < 2:
        return parts[0] if parts else None
    names = [f.name for f in msgspec.structs.fields(CompletionLogprobs)]
    return CompletionLogprobs(*([x for part in parts for x in getattr(part, name)] for name in names))
