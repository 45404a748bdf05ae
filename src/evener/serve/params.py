"""Request fields shared by both generating endpoints: their types, their ranges, the engine's parameters."""

import math
import secrets
from typing import Annotated

from msgspec import Meta, Struct

from evener.engine.request import SamplingParams
from evener.errors import ContextTooLong, InvalidRequest, UnknownModel, UnsupportedParameter
from evener.serve.fields import shown

MAX_CHOICES = 128
MAX_STOPS = 16
MAX_TOKENS = 2**31 - 1
"""Far beyond any context, whose own limit is checked with the prompt at hand."""


class StreamOptions(Struct, frozen=True, forbid_unknown_fields=True):
    """What a stream carries besides tokens."""

    include_usage: bool = False
    """A last chunk with the usage of the whole request."""
    continuous_usage_stats: bool = False
    """The usage so far in every chunk (vLLM)."""
    include_obfuscation: bool = False
    """Accepted, no padding is ever added: it hides token sizes on an open network, where TLS belongs in front."""


class ResponseFormat(Struct, frozen=True):
    """Only `{"type": "text"}`; others are refused by name."""

    type: str


class SamplingFields(Struct, kw_only=True, forbid_unknown_fields=True):
    """How to generate, online and offline alike. Ranges as in vLLM."""

    temperature: Annotated[float, Meta(ge=0, le=100)] = 1.0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Meta(ge=-1)] = 0
    """0 or -1: all."""
    min_p: Annotated[float, Meta(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] = 1.0
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] = 0.0
    seed: int | None = None
    """-2**63 to 2**64 - 1; absent: drawn."""
    n: Annotated[int, Meta(ge=1, le=MAX_CHOICES)] = 1
    stop: str | Annotated[list[str], Meta(max_length=MAX_STOPS)] = []
    stop_token_ids: Annotated[list[int], Meta(max_length=MAX_STOPS)] = []
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    skip_special_tokens: bool = True
    priority: Annotated[int, Meta(ge=-(2**31), le=2**31 - 1)] = 0
    """Lower runs earlier."""

    def stops(self) -> tuple[str, ...]:
        """The stop strings. Raises InvalidRequest for an empty one, which would stop everything."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if "" in stops:
            raise InvalidRequest("stop contains an empty string; give at least one character or leave it out", "stop")
        return stops

    def check(self, vocab: int) -> None:
        """What types and ranges alone do not tell. `vocab` is the model's vocabulary size."""
        self.stops()
        check_tokens(self.stop_token_ids, vocab, "stop_token_ids")
        if self.seed is not None and not -(2**63) <= self.seed < 2**64:
            raise InvalidRequest(f"seed={shown(self.seed)} is not a 64-bit integer (-2**63 to 2**64 - 1)", "seed")

    def sampling(self, choice: int, seed: int, logprobs: int | None, prompt_logprobs: int | None) -> SamplingParams:
        """The engine's parameters for one of the n choices."""
        return SamplingParams(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            seed=seed,
            choice=choice,
            logprobs=logprobs,
            prompt_logprobs=prompt_logprobs,
        )

    def drawn_seed(self) -> int:
        """The client's seed as 64 unsigned bits, or a fresh one."""
        return secrets.randbits(64) if self.seed is None else self.seed % 2**64


class GenerationFields(SamplingFields, kw_only=True, forbid_unknown_fields=True):
    """Fields of /v1/completions and /v1/chat/completions alike."""

    model: str | None = None
    """A served name; absent: the first of them."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    # Accepted without effect, as nothing here would do anything with them: no accounts, no storage, no abuse
    # monitor; prefixes are reused whoever sends them.
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def check(self, vocab: int) -> None:
        """What types and ranges alone do not tell. `vocab` is the model's vocabulary size."""
        super().check(vocab)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest(
                "stream_options needs stream=true; set it or leave stream_options out", "stream_options"
            )
        if self.response_format is not None and self.response_format.type != "text":
            raise UnsupportedParameter(
                f"response_format.type={shown(self.response_format.type)} is not supported by this server; use 'text'",
                "response_format",
            )


def check_tokens(tokens: list[int], vocab: int, param: str) -> None:
    """Raises InvalidRequest naming the first id that the model does not have."""
    if tokens and not (min(tokens) >= 0 and max(tokens) < vocab):
        at, bad = next((k, t) for k, t in enumerate(tokens) if not 0 <= t < vocab)
        raise InvalidRequest(f"{param}[{at}]={shown(bad)} is not a token id; ids are 0 to {vocab - 1}", param)


def check_top_logprobs(count: int, limit: int, param: str) -> None:
    """Raises InvalidRequest when more alternatives are asked for than the engine keeps."""
    if count > limit:
        raise InvalidRequest(f"{param}={count} is more than this server keeps; ask for at most {limit}", param)


def check_length(prompt_len: int, wanted: int | None, default: int | None, limit: int, param: str) -> int:
    """Output tokens to allow: `wanted` (0: only the prompt's logprobs), else `default`, else the rest of the context.

    Raises ContextTooLong with the numbers when prompt and output exceed `limit`, the tokens of one sequence;
    `param` is the field the prompt came in.
    """
    rest = limit - prompt_len
    if rest < (0 if wanted == 0 else 1):
        raise ContextTooLong(
            f"this model's maximum context length is {limit} tokens, but the prompt alone has {prompt_len} and "
            "leaves no room for an answer; shorten the prompt",
            param,
        )
    if wanted is None:
        return rest if default is None else min(default, rest)
    if wanted > rest:
        raise ContextTooLong(
            f"this model's maximum context length is {limit} tokens, but you asked for {prompt_len + wanted} "
            f"({prompt_len} in the prompt, {wanted} for the answer); shorten the prompt or ask for at most {rest}",
            param,
        )
    return wanted


def check_text_length(text: str, longest_token: int, limit: int, param: str) -> None:
    """Refuse a text that cannot fit however it is tokenised, before the time to tokenise it is spent."""
    least = math.ceil(len(text.encode()) / longest_token)
    if least >= limit:
        raise ContextTooLong(
            f"this model's maximum context length is {limit} tokens, but {param} has at least {least}; shorten it",
            param,
        )


def check_model(name: str | None, served: tuple[str, ...]) -> str:
    """The served name a request means. Raises UnknownModel."""
    if name is None:
        return served[0]
    if name not in served:
        raise UnknownModel(f"model {shown(name)} is not served here; served: {', '.join(served)}", "model")
    return name
