"""Offline generation: the same engine as the server's, without HTTP.

with LLM(devices=("cpu:0", "cpu:1"), tensor_parallel_size=2) as llm:
    for out in llm.generate(["The capital of France is"], SamplingParams(temperature=0.0, max_tokens=8)):
        print(out.outputs[0].text)
"""

import asyncio
import threading
import time
import uuid
from collections.abc import Coroutine, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar, cast

import msgspec
from msgspec import Meta, Struct

from evener.api import Prepared, make_options, prepare, start_engine
from evener.engine.batch import TokenLogprobs
from evener.errors import ContextTooLong, InvalidInput, InvalidRequest, Unavailable
from evener.execute.live.engine import LiveEngine
from evener.serve.front import Front, FrontConfig
from evener.serve.generation import Choice, Generation
from evener.serve.params import SamplingFields, check_tokens

T = TypeVar("T")
Prompt = str | list[int]


class SamplingParams(SamplingFields, kw_only=True):
    """How to generate; the sampling fields and ranges of the HTTP API.

    What only a request over HTTP can mean (model, stream, user ...) is no field: naming one is a TypeError.
    """

    max_tokens: Annotated[int, Meta(ge=1)] | None = 16
    """None: the rest of the context."""
    logprobs: Annotated[int, Meta(ge=0)] | None = None
    """Alternatives per output token; 0: the chosen token alone."""
    prompt_logprobs: Annotated[int, Meta(ge=0)] | None = None


class CompletionOutput(Struct):
    """One of the n choices of a prompt."""

    index: int
    text: str = ""
    token_ids: list[int] = []
    finish_reason: str | None = None
    """`stop` or `length`."""
    stop_reason: int | str | None = None
    logprobs: list[TokenLogprobs] | None = None


class RequestOutput(Struct):
    """What became of one prompt."""

    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    prompt_logprobs: list[TokenLogprobs] | None = None
    """Entry k belongs to prompt token k + 1."""
    cached_tokens: int = 0


class LLM:
    """A model running on this host's devices. Options are the fields of `evener.api.EngineOptions`.

    Thread-safe. Close it, or use it as a context manager: workers end with it, and with this process in any case.
    """

    def __init__(self, model: str | None = None, *, prepared: Prepared | None = None, **options: Any) -> None:
        """Start the workers. Raises InvalidInput before anything starts, StartFailed when one does not come up.

        `prepared`: what `evener.api.prepare` made, instead of a model and options.
        """
        if prepared is None:
            # Offline everything may wait; a limit would refuse what the caller has already handed over.
            prepared = prepare(make_options(model=model, **{"max_queue": 1 << 30, **options}))
        elif model is not None or options:
            raise InvalidInput("prepared says model and options itself; leave out the others")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="evener", daemon=True)
        self._thread.start()
        self._closed = False
        source = prepared.source
        try:
            tokenizer = source.tokenizer()
            config = FrontConfig(served_model_names=(source.name,), eos_token_ids=source.eos_token_ids)
            self.engine: LiveEngine = self._run(start_engine(prepared=prepared))
        except BaseException:
            self._stop_loop()
            raise
        self._front = Front(self.engine, tokenizer, config)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts (texts or token ids), all at once, in order. One SamplingParams for all, or one each.

        Raises InvalidRequest naming the value and its limit; then nothing is generated.
        """
        listed = _listed(prompts)
        given = sampling_params if sampling_params is not None else SamplingParams()
        params = [given] * len(listed) if isinstance(given, SamplingParams) else list(given)
        if len(params) != len(listed):
            raise InvalidRequest(f"{len(params)} sampling_params for {len(listed)} prompts; give one, or one each")
        return self._run(self._generate(listed, params))

    def chat(
        self, messages: list[dict[str, Any]], sampling_params: SamplingParams | None = None, **template: Any
    ) -> RequestOutput:
        """Answer one conversation through the model's chat template; `template` are further variables of it.

        Raises InvalidRequest or ContextTooLong naming the value and its limit.
        """
        return self._run(self._chat(messages, sampling_params or SamplingParams(), template))

    def close(self) -> None:
        """Stop the workers; idempotent."""
        if not self._closed:
            self._closed = True
            self._run(self.engine.close())
            self._front.close()
            self._stop_loop()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    async def _chat(
        self, messages: list[dict[str, Any]], params: SamplingParams, template: dict[str, Any]
    ) -> RequestOutput:
        text = self._front.render_chat(messages, {"add_generation_prompt": True, **template})
        tokens = await self._front.encode(text, False, "messages")
        [out] = await self._generate([tokens], [params])
        out.prompt = text
        return out

    async def _generate(self, prompts: list[Prompt], params: list[SamplingParams]) -> list[RequestOutput]:
        made = [await self._prepare(p, q) for p, q in zip(prompts, params, strict=True)]
        tasks = [asyncio.create_task(self._follow(out, choices)) for out, choices in made]
        try:
            return list(await asyncio.gather(*tasks))
        except BaseException:
            for task in tasks:  # nobody would read them
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            raise

    async def _prepare(self, prompt: Prompt, params: SamplingParams) -> tuple[RequestOutput, list[Choice]]:
        try:
            params = msgspec.convert(msgspec.to_builtins(params), SamplingParams)
        except msgspec.ValidationError as error:
            raise InvalidRequest(f"sampling_params: {error}") from error
        vocab = self.engine.model.vocab
        params.check(vocab)
        if isinstance(prompt, str):
            tokens = await self._front.encode(prompt, True, "prompt")
        else:
            tokens = list(prompt)
            check_tokens(tokens, vocab, "prompt")
        room = self.engine.max_model_len - len(tokens)
        limit = params.max_tokens if params.max_tokens is not None else max(1, room)
        if not tokens or limit > room:
            raise ContextTooLong(
                f"{len(tokens)} prompt tokens and max_tokens={limit} exceed the context of "
                f"{self.engine.max_model_len} tokens; shorten the prompt or lower max_tokens"
                if tokens
                else "prompt is empty (no tokens); give at least one",
                "prompt",
            )
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(params, name)
            if value is not None and value > self.engine.max_top_logprobs:
                raise InvalidRequest(f"{name}={value} exceeds the limit of {self.engine.max_top_logprobs}", name)
        choices = self._front.choices(
            f"llm-{uuid.uuid4().hex[:12]}", [tokens], [limit], params,
            logprobs=params.logprobs, prompt_logprobs=params.prompt_logprobs,
        )  # fmt: skip
        text = prompt if isinstance(prompt, str) else None
        asked = params.logprobs is not None
        outputs = [CompletionOutput(c.index, logprobs=[] if asked else None) for c in choices]
        return RequestOutput(text, tokens, outputs), choices

    async def _follow(self, out: RequestOutput, choices: list[Choice]) -> RequestOutput:
        recorder = _TokenRecorder(self.engine)
        generation = Generation(recorder, self._front.metrics, choices, time.perf_counter())
        async with aclosing(generation.deltas()) as deltas:
            async for delta in deltas:
                output = out.outputs[delta.choice]
                output.text += delta.text
                if delta.finish is not None:
                    output.finish_reason, output.stop_reason = delta.finish, delta.stop_reason
                if output.logprobs is not None:
                    output.logprobs += [t.logprobs for t in delta.tokens]
                if delta.prompt_logprobs is not None:
                    out.prompt_logprobs = delta.prompt_logprobs
        for choice in choices:
            out.outputs[choice.index].token_ids = recorder.tokens[choice.request.request_id][: choice.n_tokens]
            out.cached_tokens = max(out.cached_tokens, choice.cached_tokens)
        return out

    def _run(self, work: Coroutine[Any, Any, T]) -> T:
        if self._loop.is_closed():
            work.close()
            raise Unavailable("this LLM is closed; make a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except KeyboardInterrupt:
            future.cancel()
            raise

    def _stop_loop(self) -> None:
        async def settle() -> None:
            # What was interrupted cleans up before its loop ends.
            others = [t for t in asyncio.all_tasks() if t is not asyncio.current_task()]
            await asyncio.wait(others, timeout=10) if others else None

        asyncio.run_coroutine_threadsafe(settle(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


class _TokenRecorder:
    """The engine, remembering the token ids that it gave out."""

    def __init__(self, engine: LiveEngine) -> None:
        self.model, self.plan = engine.model, engine.plan
        self.max_model_len, self.max_top_logprobs = engine.max_model_len, engine.max_top_logprobs
        self.cancel, self.status, self.close = engine.cancel, engine.status, engine.close
        self.ledger, self.served = engine.ledger, engine.served
        self.tokens: dict[str, list[int]] = {}
        self._engine = engine

    async def submit(self, request: Any) -> Any:
        kept = self.tokens.setdefault(request.request_id, [])
        async with aclosing(cast(Any, self._engine.submit(request))) as answers:
            async for answer in answers:
                kept += answer.tokens
                yield answer


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]
