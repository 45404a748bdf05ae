"""What every endpoint shares: the engine, the vocabulary, the settings, and how a prompt becomes sequences."""

import asyncio
import hashlib
import re
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from typing import Any

import msgspec
from msgspec import Struct

from evener.engine.request import Request
from evener.errors import InvalidInput, InvalidRequest
from evener.execute.base import Engine
from evener.serve.detokenize import Detokenizer
from evener.serve.generation import Choice
from evener.serve.metrics import Metrics
from evener.serve.params import SamplingFields, check_text_length
from evener.serve.vocabulary import Tokenizer, Vocabulary

VERSION = version("evener")
INLINE_CHARS = 4096
"""Texts up to this length are tokenised at once (below a millisecond); longer ones in a thread."""
_ORIGIN = re.compile(r"\*|https?://[^/\s]+")
MAX_SEQUENCES = 1024
"""Prompts times choices of one client request."""


class FrontConfig(Struct, frozen=True, kw_only=True):
    """Settings of the HTTP front. Raises InvalidInput for what cannot be."""

    served_model_names: tuple[str, ...]
    """What clients may call the model; the first is shown in answers."""
    eos_token_ids: tuple[int, ...]
    """Tokens that end a sequence, unless the client says ignore_eos."""
    api_key: str | None = None
    """Asked for as `Authorization: Bearer`; None: open."""
    allowed_origins: tuple[str, ...] = ()
    """Origins whose web pages may read answers (CORS), like `http://localhost:3000`; `*`: any. None by default, for a
    page from anywhere could use a server without a key."""
    max_body_bytes: int = 8 * 2**20
    chat_template: str | None = None
    """Jinja text used instead of the tokenizer's own."""

    def __post_init__(self) -> None:
        if not self.served_model_names or not all(self.served_model_names):
            raise InvalidInput("a served model name is missing or empty; give at least one character")
        if self.api_key == "":
            raise InvalidInput("the API key is empty; give one, or none to serve without")
        for origin in self.allowed_origins:
            if not _ORIGIN.fullmatch(origin):
                raise InvalidInput(
                    f"allowed origin {origin!r} is not an origin; give http://HOST[:PORT], https://HOST[:PORT] or *"
                )


class Front:
    """Handed to every endpoint."""

    def __init__(self, engine: Engine, tokenizer: Tokenizer, config: FrontConfig) -> None:
        self.engine = engine
        self.config = config
        self.vocabulary = Vocabulary(tokenizer)
        self.metrics = Metrics(engine, config.served_model_names[0])
        self.started = int(time.time())
        """Unix seconds; the `created` of the model."""
        what = msgspec.json.encode((engine.model, engine.plan))
        self.fingerprint = f"evener-{VERSION}-{hashlib.sha256(what).hexdigest()[:8]}"
        """Changes when the version, the model's shape or the plan does."""
        # One thread: tokenising must not take more than one core from the workers, however many prompts come.
        self._thread = ThreadPoolExecutor(1, "tokenise")

    async def encode(self, text: str, add_special_tokens: bool, param: str) -> list[int]:
        """Token ids of a prompt, at least one. Raises ContextTooLong or InvalidRequest naming `param`."""
        check_text_length(text, self.vocabulary.longest, self.engine.max_model_len, param)
        if len(text) <= INLINE_CHARS:
            tokens = self.vocabulary.encode(text, add_special_tokens)
        else:
            loop = asyncio.get_running_loop()
            tokens = await loop.run_in_executor(self._thread, self.vocabulary.encode, text, add_special_tokens)
        if not tokens:
            raise InvalidRequest(f"{param} is empty (no tokens); give at least one character", param)
        return tokens

    def render_chat(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> str:
        """Messages through the chat template. `options`: add_generation_prompt, continue_final_message, and the
        client's own template variables. Raises InvalidRequest."""
        tokenizer = self.vocabulary.tokenizer
        template = self.config.chat_template
        if template is None and tokenizer.chat_template is None:
            raise InvalidRequest(
                "this model has no chat template; use /v1/completions, or start the server with --chat-template FILE",
                "messages",
            )
        try:
            text: str = tokenizer.apply_chat_template(messages, tokenize=False, chat_template=template, **options)
        except Exception as error:
            # The template is the model's own program, run on the client's data: whatever it raises is about them.
            raise InvalidRequest(f"the chat template refuses these messages: {error}", "messages") from error
        return text

    def choices(
        self,
        request_id: str,
        prompts: list[list[int]],
        max_tokens: list[int],
        fields: SamplingFields,
        *,
        logprobs: int | None = None,
        prompt_logprobs: int | None = None,
    ) -> list[Choice]:
        """n sequences for each prompt, in prompt order; sequence k of a prompt is choice k of one seed.

        Raises InvalidRequest when there are too many.
        """
        if (total := len(prompts) * fields.n) > MAX_SEQUENCES:
            raise InvalidRequest(
                f"{len(prompts)} prompts times n={fields.n} are {total} sequences, the limit is {MAX_SEQUENCES}; "
                "send several requests",
                "n" if fields.n > 1 else "prompt",
            )
        seed = fields.drawn_seed()
        client_stop_ids = tuple(fields.stop_token_ids)
        stop_token_ids = client_stop_ids if fields.ignore_eos else client_stop_ids + self.config.eos_token_ids
        made: list[Choice] = []
        for prompt, limit in zip(prompts, max_tokens, strict=True):
            for k in range(fields.n):
                index = len(made)
                request = Request(
                    request_id=f"{request_id}-{index}",
                    prompt_len=len(prompt),
                    max_tokens=limit,
                    prompt=prompt,
                    stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
                    sampling=fields.sampling(k, seed, logprobs, prompt_logprobs),
                    priority=fields.priority,
                )
                detokenizer = Detokenizer(
                    self.vocabulary, fields.stops(), fields.include_stop_str_in_output, fields.skip_special_tokens
                )
                made.append(
                    Choice(
                        index,
                        request,
                        detokenizer,
                        client_stop_ids=frozenset(client_stop_ids),
                        include_stop=fields.include_stop_str_in_output,
                    )
                )
        return made

    def close(self) -> None:
        """End the tokenising thread. The engine belongs to whoever made it."""
        self._thread.shutdown(wait=False, cancel_futures=True)
