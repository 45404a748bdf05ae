"""A readable engine that says what it is told to, and a tokenizer small enough to train on the spot."""

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import cache

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from evener.brain import BrainConfig
from evener.cost.base import BatchShape
from evener.cost.rates import default_profile
from evener.engine.batch import TokenLogprobs
from evener.engine.events import Answer
from evener.engine.request import Request
from evener.errors import EvenerError, Unavailable
from evener.execute.base import ReplicaStatus, Status
from evener.execute.live.record import FORMAT
from evener.execute.served import Header, ServedLog
from evener.ledger.ledger import Ledger
from evener.spec.cluster import Cluster, parse_device
from evener.spec.model import ModelSpec
from evener.spec.plan import Plan, Replica, Shard, Stage
from evener.units import Nanoseconds

MODEL = "tiny"
CHATML = (
    "{% for m in messages %}{% if m['role'] == 'developer' %}{{ raise_exception('no developers here') }}{% endif %}"
    "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}{{ shout }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@cache
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 400 tokens; letters beyond English come as several bytes."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog, and the dog says hello to the fox; \U0001f999 llama STOP "
    backend.train_from_iterator([text] * 20, trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>")
    tokenizer.chat_template = CHATML
    return tokenizer


def ids(text: str) -> list[int]:
    """Token ids of a text."""
    return tiny_tokenizer().encode(text, add_special_tokens=False)


EOS = 1
VOCAB = 420
"""More rows than the tokenizer has pieces, as in models with a padded vocabulary."""


class FakeCosts:
    """A batch takes a microsecond per token."""

    version = 0

    def stage_ns(self, replica: int, stage: int, shape: BatchShape) -> Nanoseconds:
        return Nanoseconds(1000 * shape.tokens)

    def batch_ns(self, replica: int, shape: BatchShape) -> Nanoseconds:
        return self.stage_ns(replica, 0, shape)

    latency_ns = batch_ns

    def error(self) -> float | None:
        return None


def header_of(engine: "FakeEngine", started: int = 0) -> Header:
    """What a live engine of this plan says of itself, with assumed speeds."""
    devices = [parse_device("cpu:0")]
    costs = {
        "kind": "roofline", "version": 0, "dtype": "fp32", "kv_dtype": "fp32",
        "profile": msgspec.to_builtins(default_profile(devices)),
    }  # fmt: skip
    return Header(
        FORMAT, "test", Nanoseconds(started), engine.model, "/home/somebody/tiny", engine.plan,
        Cluster(tuple(devices)), [100], BrainConfig(), costs,
    )  # fmt: skip


class FakeEngine:
    """Answers each request with `reply` token by token, then EOS, or stops at its cap.

    It remembers what was submitted and cancelled; `live` are the requests that hold KV.
    """

    def __init__(
        self,
        reply: str | Callable[[Request], list[int]] = " hello to the fox",
        *,
        delay_s: float = 0.0,
        refuse: EvenerError | None = None,
        fail_after: tuple[int, Exception] | None = None,
        step: int = 1,
        max_model_len: int = 256,
    ) -> None:
        self.model = ModelSpec("llama", VOCAB, 8, 1, 1, 1, 8, 16, max_model_len)
        self.plan = Plan((Replica((Stage((0, 1), (Shard("cpu:0", (0, 1), (0, 16), (0, VOCAB), (0, VOCAB)),)),)),))
        self.max_model_len = max_model_len
        self.max_top_logprobs = 5
        self.submitted: list[Request] = []
        self.cancelled: dict[str, bool] = {}
        self.live: set[str] = set()
        self.closed = False
        self.down = ""
        self.kept: Ledger | None = Ledger(self.plan, FakeCosts(), start=Nanoseconds(0))
        self.log = ServedLog(header_of(self), keep=8)
        self._reply = reply
        self._delay_s = delay_s
        self._refuse = refuse
        self._fail_after = fail_after
        self._step = step
        self._tokens = 0

    async def submit(self, request: Request) -> AsyncIterator[Answer]:
        """An async generator, as the contract allows: it begins with the first `__anext__`."""
        self.submitted.append(request)
        if self._refuse is not None:
            raise self._refuse
        self.live.add(request.request_id)
        try:
            async for answer in self._answers(request):
                yield answer
        except (GeneratorExit, asyncio.CancelledError):  # closed early
            self.cancel(request.request_id)
            raise
        finally:
            self.live.discard(request.request_id)

    async def _answers(self, request: Request) -> AsyncIterator[Answer]:
        reply = ids(self._reply) if isinstance(self._reply, str) else self._reply(request)
        ends = EOS in request.stop_token_ids and len(reply) < request.max_tokens
        if not request.max_tokens:
            yield Answer(request.request_id, [], 0, finish="length", prompt_logprobs=self._prompt_logprobs(request))
            return
        tokens = (reply if ends else reply * request.max_tokens)[: request.max_tokens]
        cached = 16 * (request.prompt_len // 16) if self._tokens else 0
        for at in range(0, len(tokens), self._step):
            await asyncio.sleep(self._delay_s)
            if request.request_id in self.cancelled:
                finish = "stop" if self.cancelled[request.request_id] else "cancelled"
                yield Answer(request.request_id, [], 0, finish)
                return
            if self._fail_after is not None and at >= self._fail_after[0]:
                raise self._fail_after[1]
            some = tokens[at : at + self._step]
            stop = next((t for t in some if t in request.stop_token_ids), None)
            some = some[: some.index(stop)] if stop is not None else some
            self._tokens += len(some)
            last = not ends and at + self._step >= len(tokens)
            yield Answer(
                request.request_id,
                some,
                len(some),
                finish="stop" if stop is not None else "length" if last else None,
                stop_token=stop,
                logprobs=[self.logprobs(t) for t in some] if request.sampling.logprobs is not None else None,
                prompt_logprobs=self._prompt_logprobs(request) if at == 0 else None,
                cached_tokens=cached if at == 0 else 0,
            )
            if stop is not None:
                return
        if ends:
            yield Answer(request.request_id, [], 0, finish="stop", stop_token=EOS)

    @staticmethod
    def logprobs(token: int) -> TokenLogprobs:
        """The chosen token is the likeliest; its neighbours follow."""
        return TokenLogprobs(token, -0.5, 1, [(token, -0.5), *(((token + k) % 400, -0.5 - k) for k in range(1, 5))])

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprobs] | None:
        if request.sampling.prompt_logprobs is None:
            return None
        assert request.prompt is not None
        return [self.logprobs(t) for t in request.prompt[1:]]

    def cancel(self, request_id: str, stopped: bool = False) -> None:
        """Only what lives can be cancelled."""
        if request_id in self.live:
            self.cancelled.setdefault(request_id, stopped)

    def status(self) -> Status:
        """One replica."""
        replica = ReplicaStatus(
            replica=0, devices=("cpu:0",), alive=not self.down, reason=self.down, running=len(self.live),
            kv_blocks=100, kv_blocks_free=100 - 10 * len(self.live), output_tokens=self._tokens,
        )  # fmt: skip
        return Status(not self.down, (replica,), f"{self.down}; restart the server" if self.down else "")

    def ledger(self) -> Ledger:
        """An empty one, or the one it was given."""
        if self.kept is None:
            raise Unavailable("this server keeps no ledger; start it without --no-ledger")
        return self.kept

    def served(self) -> ServedLog:
        """What it was told."""
        return self.log

    async def close(self) -> None:
        """Nothing to free."""
        self.closed = True
