"""Proves plan equivalence (law 6) through the live path, against transformers.

Prompts run all at once through a real engine whose KV is too small for them, so that chunks, mixed batches, prefix
hits and preemption all happen. Then transformers computes the same sequences, teacher-forced: at every position the
engine's token must be the reference's argmax, unless the reference's best two are closer than the tolerance. By
induction the greedy texts are then the same up to such ties.
"""

import math
import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from msgspec import Struct, structs

from evener.api import make_options, prepare
from evener.engine.batch import TokenLogprobs
from evener.errors import InvalidInput
from evener.llm import LLM, RequestOutput, SamplingParams
from evener.model.source import ModelSource, open_model
from evener.spec.memory import BLOCK_TOKENS

# SmolLM2-135M. bf16, 400 positions of random tokens and of prose: the largest error was 0.004, the mean divergence over
# the whole vocabulary 1.7e-4. int8, 1,137 positions with each of ten plans: 0.04 to 0.12, 0.2% of the positions of one
# device above 0.06; the mean divergence as told here 4.3e-3 to 5.8e-3.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.015, "int8": 0.06}
"""Error of a log-probability over the spread of its row (greatest minus least over the vocabulary): in fp32 the
largest that passes; elsewhere what all but MOST_BEYOND of the positions keep to and, doubled, how far from the best a
chosen token may be."""
KL_BOUND = {"fp32": 1e-6, "bf16": 1e-3, "int8": 2e-2}
"""Mean KL divergence from the reference, nats, over the engine's best tokens and all others as one."""
MOST_BEYOND = 0.01
"""Share of the positions of a narrow format that may be further off than the tolerance."""
_KEPT = 128
"""Reference log-probabilities kept per position: more than the engine is asked for."""
_TOP = 8


class Verdict(Struct, frozen=True):
    """What `evener verify` reports."""

    plan: str
    passed: bool
    """Equal to the reference, and everything that the policy does has been seen."""
    equal: bool
    not_seen: tuple[str, ...]
    """What the policy does and this run did not: the verdict does not cover it."""
    dtype: str
    kv_dtype: str
    kl: float
    """Mean KL divergence from the reference, nats, over the engine's best tokens and all others as one."""
    kl_bound: float
    max_rel_err: float
    """Over all compared log-probabilities (the best of every position): |engine - reference| / row spread. Bounded by
    `tolerance` in fp32."""
    beyond: float
    """Share of the positions with an error above `tolerance`; bounded in the narrow formats."""
    greedy_equal: int
    """Sequences whose whole greedy text is the reference's."""
    diverged_at_ties: int
    """Sequences that left the reference where its best two tokens are closer than the tolerance."""
    diverged_wrongly: int
    """Sequences that left it elsewhere: a defect."""
    sequences: int
    positions: int
    tolerance: float
    chunked_prompts: int
    mixed_batches: int
    prefix_hit_tokens: int
    preemptions: int
    seconds: float


class _Position(Struct, frozen=True):
    ids: torch.Tensor
    logprobs: torch.Tensor
    spread: float


class Reference:
    """transformers' own loading of the same weights, in fp32, one sequence at a time; results are kept."""

    def __init__(self, source: ModelSource) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        quiet: Any = logging
        quiet.disable_progress_bar()
        path = source.path
        where: dict[str, Any] = {"dtype": torch.float32}
        if path.suffix == ".gguf":
            where["gguf_file"] = path.name
            path = path.parent
        loader: Any = AutoModelForCausalLM
        self._model = loader.from_pretrained(path, **where).eval()
        self._known: dict[tuple[int, ...], list[_Position]] = {}

    @torch.inference_mode()
    def positions(self, tokens: list[int], start: int) -> list[_Position]:
        """The best log-probabilities after each of tokens[start:]."""
        key = (start, *tokens)
        if key not in self._known:
            logits = self._model(torch.tensor([tokens])).logits[0, start:].float()
            logprobs = torch.log_softmax(logits, -1)
            top = logprobs.topk(min(_KEPT, logprobs.shape[-1]))
            spread = (logprobs.amax(-1) - logprobs.amin(-1)).tolist()
            self._known[key] = [_Position(i, v, s) for i, v, s in zip(top.indices, top.values, spread, strict=True)]
        return self._known[key]


def make_prompts(vocab: int, count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Random prompts of 1 to `longest` tokens; a third share one of two prefixes."""
    rng = random.Random(seed)

    def ids(n: int) -> list[int]:
        return [rng.randrange(min(100, vocab // 2), min(vocab, 40_000)) for _ in range(n)]

    shared = [ids(longest // 3), ids(longest // 4)]
    prompts = []
    for k in range(count):
        body = ids(max(1, min(longest, round(rng.lognormvariate(3.8, 0.9)))))
        prompts.append((shared[k % 2] + body)[:longest] if k % 3 == 0 else body)
    return prompts


class Compared(NamedTuple):
    """One sequence beside the reference."""

    worst: float
    """Largest relative error."""
    verdict: str
    """`equal`, `tie` or `wrong`."""
    positions: int
    kl: float
    """Sum over the positions."""
    beyond: int
    """Positions with an error above the tolerance."""


def divergence(ours: TokenLogprobs, theirs: dict[int, float]) -> float:
    """KL divergence of the engine from the reference over the engine's best tokens and the rest as one outcome.

    Merging outcomes only lowers a divergence, so this is a lower bound of the full one.
    """
    p = [math.exp(theirs.get(token, -math.inf)) for token, _ in ours.top]
    q = [math.exp(logprob) for _, logprob in ours.top]
    p.append(max(0.0, 1.0 - math.fsum(p)))
    q.append(max(1e-12, 1.0 - math.fsum(q)))
    return math.fsum(a * math.log(a / b) for a, b in zip(p, q, strict=True) if a > 0.0)


def compare(
    reference: Reference, prompt: list[int], out: RequestOutput, tolerance: float, exact: bool = True
) -> Compared:
    """A sequence of the engine beside the reference's distributions over the same tokens.

    A greedy token may differ where the reference's best two are within `tolerance`. Narrow formats (not `exact`) move
    every token by up to the tolerance, so that any within twice of it from the best may win; and a token may be among
    their best that the reference has not kept, and so holds for no likelier than the last that it has.
    """
    output = out.outputs[0]
    assert output.logprobs is not None
    tokens = prompt + output.token_ids
    # prompt_logprobs entry k belongs to prompt token k + 1, so it is compared with the distribution after token k.
    start = 0 if out.prompt_logprobs else len(prompt) - 1
    wanted: list[TokenLogprobs] = [*(out.prompt_logprobs or []), *output.logprobs]
    positions = reference.positions(tokens[:-1], start)
    assert len(positions) == len(wanted), f"{len(positions)} positions, {len(wanted)} log-probabilities"
    worst, verdict, kl, beyond = 0.0, "equal", 0.0, 0
    first_output = len(positions) - len(output.token_ids)
    for k, (ours, theirs) in enumerate(zip(wanted, positions, strict=True)):
        known = dict(zip(theirs.ids.tolist(), theirs.logprobs.tolist(), strict=True))
        last = float(theirs.logprobs[-1])
        assert ours.top, "the engine sent no alternatives to compare"
        kl += divergence(ours, known)
        here = 0.0
        for token, logprob in ours.top:
            if exact and token not in known:
                here, verdict = math.inf, "wrong"
                continue
            error = abs(logprob - known.get(token, min(last, logprob))) / theirs.spread
            here = max(here, error if math.isfinite(error) else math.inf)
        worst, beyond = max(worst, here), beyond + (here > tolerance)
        if k >= first_output and ours.token != int(theirs.ids[0]):
            best = float(theirs.logprobs[0])
            if exact:
                gap = (best - float(theirs.logprobs[1])) / theirs.spread
                close = gap < tolerance and ours.token == int(theirs.ids[1])
            else:
                close = (best - known.get(ours.token, -math.inf)) / theirs.spread < 2 * tolerance
            verdict = "tie" if verdict != "wrong" and close else "wrong"
    return Compared(worst, verdict, len(positions), kl, beyond)


def size_kv(prompts: Sequence[int], tokens: int, rows: int, chunk: int, longest: int) -> int:
    """KV blocks of a replica that runs short: a third of what the sequences that run at once hold at their ends.

    `prompts` are lengths in tokens, answers have `tokens`. At once run `rows` of them, or as many as are prefilled by
    batches of `chunk` tokens while one answers. There is always room for the longest alone, of `longest` tokens.
    """
    blocks = [-(-(prompt + tokens) // BLOCK_TOKENS) for prompt in prompts]
    prefilled = -(-tokens * chunk * len(prompts) // sum(prompts))
    at_once = min(rows, len(blocks), prefilled) * sum(blocks) // len(blocks)
    return max(-(-longest // BLOCK_TOKENS), -(-at_once // 3))


def claims(policy: str, rows: int) -> tuple[str, ...]:
    """What a run under this policy must show, of the fields of Verdict, with up to `rows` sequences at once."""
    if policy == "static":  # whole prompts, one padded batch, room taken at the start, no prefix is looked for
        return ()
    alone = ("chunked_prompts", "prefix_hit_tokens")
    return alone if rows == 1 else (*alone, "mixed_batches", "preemptions")


def verify(
    options: dict[str, Any],
    *,
    requests: int = 64,
    tokens: int = 64,
    longest: int = 160,
    seed: int = 0,
    reference: Reference | None = None,
) -> Verdict:
    """Run the engine that `options` (fields of EngineOptions) describe and compare it. Raises EvenerError.

    Each replica has so few KV blocks that it must preempt, however many devices share them.
    """
    if requests < 1 or tokens < 1:
        raise InvalidInput(f"requests={requests} and tokens={tokens} must be at least 1")
    for name in ("router", "kv_cache_memory", "max_model_len"):
        if name in options:
            raise InvalidInput(f"{name} is set by the verification itself, which sizes the KV cache; leave it out")
    began = time.monotonic()
    settings = {"max_num_seqs": 24, "max_num_batched_tokens": 64, "max_queue": 1 << 30, **options}
    source = open_model(settings.get("model"))
    longest = min(longest, source.spec.max_position - tokens)
    if longest < 1:
        raise InvalidInput(f"tokens={tokens} leaves no room for a prompt in {source.spec.max_position}; lower it")
    settings |= {"router": "round-robin", "max_model_len": longest + tokens}
    prepared = prepare(make_options(**settings), source)
    prompts = make_prompts(prepared.model.vocab, requests, longest, seed)
    replicas = len(prepared.plan.replicas)
    rows = min(prepared.options.max_num_seqs, -(-requests // replicas))
    few = size_kv([len(p) for p in prompts], tokens, rows, prepared.max_num_batched_tokens, longest + tokens)
    prepared = structs.replace(prepared, kv_blocks=[min(few, blocks) for blocks in prepared.kv_blocks])
    with LLM(prepared=prepared) as llm:
        watch = _Watch(llm.engine)
        kept = _run(llm, prompts, tokens, replicas)
        status = llm.engine.status().replicas
    seen = {
        "chunked_prompts": watch.chunked,
        "mixed_batches": watch.mixed,
        "prefix_hit_tokens": sum(r.prefix_hit_tokens for r in status),
        "preemptions": sum(r.preemptions for r in status),
    }
    not_seen = tuple(name for name in claims(prepared.options.policy, rows) if not seen[name])
    reference = reference or Reference(source)
    dtype, kv_dtype = prepared.options.dtype, prepared.options.kv_dtype or prepared.options.dtype
    tolerance, kl_bound = (max(bounds[dtype], bounds[kv_dtype]) for bounds in (TOLERANCE, KL_BOUND))
    exact = dtype == kv_dtype == "fp32"
    compared = [compare(reference, prompt, out, tolerance, exact) for prompt, out in kept]
    worst = max(c.worst for c in compared)
    verdicts = Counter(c.verdict for c in compared)
    positions = sum(c.positions for c in compared)
    kl = sum(c.kl for c in compared) / positions
    beyond = sum(c.beyond for c in compared) / positions
    equal = beyond <= (0.0 if exact else MOST_BEYOND) and kl <= kl_bound and not verdicts["wrong"]
    return Verdict(
        plan=prepared.plan.name,
        passed=equal and not not_seen,
        equal=equal,
        not_seen=not_seen,
        dtype=dtype,
        kv_dtype=kv_dtype,
        kl=kl,
        kl_bound=kl_bound,
        max_rel_err=worst,
        beyond=beyond,
        greedy_equal=verdicts["equal"],
        diverged_at_ties=verdicts["tie"],
        diverged_wrongly=verdicts["wrong"],
        sequences=len(kept),
        positions=positions,
        tolerance=tolerance,
        seconds=time.monotonic() - began,
        **seen,
    )


def _run(llm: LLM, prompts: list[list[int]], tokens: int, replicas: int) -> list[tuple[list[int], RequestOutput]]:
    """Every prompt at once; a quarter of them again; then the longest alone, until each replica has had it twice."""

    def params(prompt_logprobs: bool, max_tokens: int) -> SamplingParams:
        return SamplingParams(
            temperature=0.0, max_tokens=max_tokens, ignore_eos=True, logprobs=_TOP,
            prompt_logprobs=_TOP if prompt_logprobs else None,
        )  # fmt: skip

    first = [params(k % 8 == 1, tokens) for k in range(len(prompts))]
    kept = list(zip(prompts, llm.generate(list(prompts), first), strict=True))
    kept += zip(prompts[::4], llm.generate(list(prompts[::4]), first[::4]), strict=True)
    # Under such pressure the cache may have forgotten all of them: what was just computed is found for certain.
    longest = max(prompts, key=len)
    for _ in range(2 * replicas):
        kept.append((longest, llm.generate(longest, params(False, min(tokens, 8)))[0]))
    return kept


class _Watch:
    """Counts what the engine's batches contain, so that a verdict says what it covered."""

    def __init__(self, engine: Any) -> None:
        self.chunked = 0
        self.mixed = 0
        self._issue = engine._issue
        engine._issue = self._count

    def _count(self, command: Any) -> None:
        batch = command.batch
        self.chunked += sum(1 for c in batch.chunks if not c.sample)
        self.mixed += bool(batch.chunks) and batch.step
        self._issue(command)
