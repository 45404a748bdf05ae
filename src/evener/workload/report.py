"""Records -> figures, with the definitions of vLLM's `bench serve` unless said otherwise.

* TTFT: first piece of the answer minus the *scheduled* arrival. vLLM counts from the moment of sending; here a
  client that cannot keep up makes the figures worse instead of better. In a closed loop the two are the same.
* TPOT: (last - first piece) / (output tokens - 1), per request; an answer of one token has none.
* ITL: the gaps between successive pieces, of all requests together. A piece that carries several tokens is one gap,
  as in vLLM: it is what a reader of the stream sees. `tokens_per_chunk` tells how many tokens a piece carries.
* e2e: last piece minus the scheduled arrival.
* Throughput counts completed requests only, over the whole duration. Percentiles interpolate linearly.
* Goodput: completed requests per second that meet every bound of the SLO; without one, all completed.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np
from msgspec import Struct

from evener.workload.drive import Record, Run
from evener.workload.slo import Slo


class Summary(Struct, frozen=True):
    """Percentiles and mean; all None when there was nothing to measure."""

    p50: float | None
    p90: float | None
    p99: float | None
    mean: float | None


class Report(Struct, frozen=True):
    """One run in figures. `completed + failed == requests`."""

    requests: int
    completed: int
    failed: int
    duration_s: float
    input_tokens: int
    output_tokens: int
    output_tok_s: float
    total_tok_s: float
    ttft_ms: Summary
    tpot_ms: Summary
    itl_ms: Summary
    e2e_ms: Summary
    goodput_req_s: float
    failures: dict[str, int]
    """Reason -> requests."""
    failure_examples: dict[str, str]
    """Reason -> what the first such request was told."""
    short_outputs: int
    """Completed with fewer output tokens than asked for."""
    tokens_per_chunk: float | None
    open_loop: bool
    """Requests are sent when they are due; otherwise as earlier ones end."""
    arrival_req_s: float | None
    """Achieved: (sent - 1) / (last sent - first sent). None in a closed loop, where the answers set the pace, and where
    all are sent at once."""
    lateness_ms: Summary
    """Sent minus scheduled, open loop only: large values mean that the client, not the server, was the limit."""
    client_cpu_s: float
    """CPU time of the client's process; offline it includes the engine's control process."""


def summarise(values: Iterable[float]) -> Summary:
    """Percentiles and mean of `values`, in their unit."""
    array = np.fromiter(values, dtype=np.float64)
    if not len(array):
        return Summary(None, None, None, None)
    p50, p90, p99 = (float(x) for x in np.percentile(array, (50, 90, 99)))
    return Summary(p50, p90, p99, float(array.mean()))


def make_report(run: Run, slo: Slo | None = None) -> Report:
    """The figures of a run, whole or interrupted."""
    done = [r for r in run.records if r.failure is None]
    failed = [r for r in run.records if r.failure is not None]
    output = sum(r.output_tokens for r in done)
    total = output + sum(r.input_tokens for r in done)
    chunks = sum(len(r.chunk_s) for r in done)
    slo = slo or Slo()
    good = sum(slo.met(_ttft_ms(r), _tpot_ms(r), _e2e_ms(r)) for r in done)
    sent = sorted(r.sent_s for r in run.records if r.sent_s is not None)
    waits = any(r.scheduled_s != run.records[0].scheduled_s for r in run.records)
    examples: dict[str, str] = {}
    for r in failed:
        examples.setdefault(str(r.failure), r.detail)
    return Report(
        requests=len(run.records),
        completed=len(done),
        failed=len(failed),
        duration_s=run.duration_s,
        input_tokens=total - output,
        output_tokens=output,
        output_tok_s=_per_second(output, run),
        total_tok_s=_per_second(total, run),
        ttft_ms=summarise(_ttft_ms(r) for r in done),
        tpot_ms=summarise(t for r in done if (t := _tpot_ms(r)) is not None),
        itl_ms=summarise((b - a) * 1e3 for r in done for a, b in pairwise(r.chunk_s)),
        e2e_ms=summarise(_e2e_ms(r) for r in done),
        goodput_req_s=_per_second(good, run),
        failures=dict(Counter(str(r.failure) for r in failed)),
        failure_examples=examples,
        short_outputs=sum(r.output_tokens < r.asked_tokens for r in done),
        tokens_per_chunk=output / chunks if chunks else None,
        open_loop=run.open_loop,
        arrival_req_s=_rate(sent) if run.open_loop and waits else None,
        lateness_ms=summarise(
            (r.sent_s - r.scheduled_s) * 1e3 for r in run.records if run.open_loop and r.sent_s is not None
        ),
        client_cpu_s=run.client_cpu_s,
    )


def _ttft_ms(r: Record) -> float:
    return (r.chunk_s[0] - r.scheduled_s) * 1e3


def _tpot_ms(r: Record) -> float | None:
    return (r.chunk_s[-1] - r.chunk_s[0]) / (r.output_tokens - 1) * 1e3 if r.output_tokens > 1 else None


def _e2e_ms(r: Record) -> float:
    return (r.chunk_s[-1] - r.scheduled_s) * 1e3


def _per_second(count: int, run: Run) -> float:
    return count / run.duration_s if run.duration_s > 0 else 0.0


def _rate(sent: Sequence[float]) -> float | None:
    span = sent[-1] - sent[0] if sent else 0.0
    return (len(sent) - 1) / span if span > 0 else None
