"""What one run sends and when: the options of `evener bench`, checked, and the request list they ask for."""

import math
from pathlib import Path

import numpy as np
from msgspec import Struct
from msgspec.structs import replace

from evener.errors import InvalidInput
from evener.workload import arrivals
from evener.workload.lengths import InOrder, Lengths, parse_lengths
from evener.workload.requests import Prompts, Text, TimedRequest, build_requests, parse_token_ids, token_ids_of
from evener.workload.trace import Trace, read_trace

DEFAULT_REQUESTS = 64
DEFAULT_INPUT = "lognormal:180:0.8:16:1000"
DEFAULT_OUTPUT = "lognormal:100:0.7:8:400"


class Traffic(Struct, frozen=True, kw_only=True):
    """Fields are named after the options; None is the default that `evener bench --help` states."""

    requests: int | None = None
    concurrency: int | None = None
    rate: float | None = None
    """Requests per second; inf: all at once."""
    burstiness: float = 1.0
    trace: Path | None = None
    rate_scale: float = 1.0
    context: int | None = None
    """Tokens that the longest request of a trace may take; see `Trace.within`."""
    input_tokens: str | None = None
    output_tokens: str | None = None
    prompts: str = "ids"
    token_ids: str = "100:32000"
    tokenizer: Path | None = None
    seed: int = 0


def make_requests(t: Traffic) -> list[TimedRequest]:
    """The request list that the options ask for (InvalidInput, InvalidTrace)."""
    if t.rate is not None and t.concurrency is not None:
        raise InvalidInput("--rate (open loop) and --concurrency (closed loop) exclude each other; give one")
    if t.burstiness != 1 and t.rate is None:
        raise InvalidInput("--burstiness shapes the arrivals of --rate; give --rate too")
    inputs: Lengths
    outputs: Lengths
    if t.trace is not None:
        if t.input_tokens or t.output_tokens:
            raise InvalidInput("--trace brings its own lengths; leave out --input-tokens and --output-tokens")
        replayed = t.rate is None and t.concurrency is None
        if t.rate_scale != 1 and not replayed:
            raise InvalidInput("--rate-scale stretches the arrivals of --trace, which --rate and --concurrency replace")
        trace = _trace(t, t.trace, replayed)
        inputs = InOrder(tuple(r.input_tokens for r in trace.rows))
        outputs = InOrder(tuple(r.output_tokens for r in trace.rows))
        n = len(trace.rows)
        times = np.array([r.arrival_s for r in trace.rows])
    else:
        if t.rate_scale != 1 or t.context is not None:
            raise InvalidInput("--rate-scale and --context scale a trace; give --trace, or leave them out")
        inputs = parse_lengths(t.input_tokens or DEFAULT_INPUT, "--input-tokens")
        outputs = parse_lengths(t.output_tokens or DEFAULT_OUTPUT, "--output-tokens")
        n = t.requests or DEFAULT_REQUESTS
        times = arrivals.at_once(n)
    if t.rate == math.inf:
        times = arrivals.at_once(n)
    elif t.rate is not None:
        # a stream of its own: changing the rate must not change the requests
        times = arrivals.gamma(n, t.rate, t.burstiness, np.random.default_rng(t.seed + 1000))
    return build_requests(times, inputs, outputs, _prompts(t), t.seed)


def make_warm_up(t: Traffic, n: int) -> list[TimedRequest]:
    """`n` unmeasured requests, all at once: the first of the same traffic, at most 8 output tokens, other prompts.

    Other prompts, so that the measured ones find nothing of theirs in a prefix cache.
    """
    if t.trace is not None:
        n = min(n, len(read_trace(t.trace, arrivals=False).rows))
    again = replace(t, requests=n, seed=t.seed + 1, concurrency=None, rate=math.inf, burstiness=1.0, rate_scale=1.0)
    return [replace(r, output_tokens=min(8, r.output_tokens)) for r in make_requests(again)]


def _trace(t: Traffic, path: Path, replayed: bool) -> Trace:
    trace = read_trace(path, arrivals=replayed)
    if t.requests is not None:
        if t.requests > len(trace.rows):
            raise InvalidInput(f"--requests {t.requests}: the trace {path} has {len(trace.rows)}; lower it")
        trace = trace.first(t.requests)
    if t.context is not None:
        trace = trace.within(t.context)
    return trace.from_zero().at_rate(t.rate_scale)


def _prompts(t: Traffic) -> Prompts:
    if t.prompts == "text":
        return Text()
    if t.prompts != "ids":
        raise InvalidInput(f"--prompts {t.prompts!r} is neither ids nor text")
    return token_ids_of(t.tokenizer) if t.tokenizer is not None else parse_token_ids(t.token_ids)


def check_fits(requests: list[TimedRequest], limit: int | None) -> None:
    """Refuse, before anything is sent, a workload that the model's context cannot hold (InvalidInput)."""
    longest = max(requests, key=lambda r: r.input_tokens + r.output_tokens)
    need = longest.input_tokens + longest.output_tokens
    if limit is not None and need > limit:
        raise InvalidInput(
            f"request {longest.index} takes {longest.input_tokens} + {longest.output_tokens} = {need} tokens, the "
            f"model's context is {limit}; shorten the lengths, or scale a trace with --context {limit}"
        )


def check_vocabulary(requests: list[TimedRequest], vocab: int) -> None:
    """Refuse token ids that the model does not have (InvalidInput). Text prompts pass."""
    largest = max((max(r.prompt) for r in requests if not isinstance(r.prompt, str)), default=0)
    if largest >= vocab:
        raise InvalidInput(
            f"token id {largest} is beyond the model's {vocab}; give --token-ids 100:{vocab} or narrower"
        )
