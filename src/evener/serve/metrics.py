"""GET /metrics: counters and latencies for Prometheus, named as vLLM names them, with the prefix `evener_`."""

import time
from collections.abc import Iterable

from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.responses import Response

from evener.errors import Unavailable
from evener.execute.base import Engine

TTFT_BUCKETS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 60, 120)
TPOT_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1, 2)
E2E_BUCKETS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 40, 60, 120, 300, 600)


class Metrics:
    """One registry per app, so that several apps in a process do not share counts."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, model_name))
        self._model = model_name

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(f"evener_{name}", text, ["model_name"], buckets=buckets, registry=self.registry)
            return made.labels(model_name)

        self._ttft = histogram("time_to_first_token_seconds", "Arrival to first output token.", TTFT_BUCKETS)
        self._tpot = histogram("request_time_per_output_token_seconds", "Mean time per later token.", TPOT_BUCKETS)
        self._e2e = histogram("e2e_request_latency_seconds", "Arrival to end of a sequence.", E2E_BUCKETS)
        self._finished = Counter(
            "evener_request_success", "Sequences by reason of their end (stop, length, abort).",
            ["model_name", "finished_reason"], registry=self.registry,
        )  # fmt: skip
        self._http = Counter(
            "evener_http_requests", "HTTP answers by path and status (499: the client left before the answer).",
            ["path", "status"], registry=self.registry,
        )  # fmt: skip

    def answered(self, path: str, status: int) -> None:
        """Count an HTTP answer; `path` is a route's template, never the client's own text."""
        self._http.labels(path, str(status)).inc()

    def timer(self, arrived: float) -> "SequenceTimer":
        """Latencies of one sequence; `arrived` on `time.perf_counter()`."""
        return SequenceTimer(self, arrived)

    def render(self) -> bytes:
        """The text exposition."""
        return generate_latest(self.registry)


class SequenceTimer:
    """Observes time to first token, time per output token and end-to-end latency of one sequence."""

    def __init__(self, metrics: Metrics, arrived: float) -> None:
        self._m = metrics
        self._arrived = arrived
        self._first: float | None = None
        self._last = arrived
        self._count = 0

    def tokens(self, count: int) -> None:
        """`count` output tokens have just come."""
        if not count:
            return
        self._last = time.perf_counter()
        self._count += count
        if self._first is None:
            self._first = self._last
            self._m._ttft.observe(self._first - self._arrived)

    def finished(self, reason: str) -> None:
        """The sequence has ended: `stop`, `length`, or `abort`, which has no latency worth knowing."""
        self._m._finished.labels(self._m._model, reason).inc()
        if reason == "abort":
            return
        self._m._e2e.observe(time.perf_counter() - self._arrived)
        if self._first is not None and self._count > 1:
            self._m._tpot.observe((self._last - self._first) / (self._count - 1))


class _EngineCollector(Collector):
    """The engine's own counters, read at each scrape."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self._engine = engine
        self._model = model_name

    def collect(self) -> Iterable[Metric]:
        """One sample per replica and metric."""
        labels = ["model_name", "replica"]
        gauges = {
            "num_requests_running": "Sequences that hold KV blocks.",
            "num_requests_waiting": "Sequences queued.",
            "kv_cache_usage_perc": "KV blocks in use, 0 to 1.",
            "batches_in_flight": "Batches issued and not yet done.",
            "replica_up": "1 while all workers of the replica live.",
        }
        counters = {
            "num_preemptions": "Sequences put back to the queue to free their KV.",
            "prefix_cache_queries": "Prompt tokens looked up in the prefix cache.",
            "prefix_cache_hits": "Prompt tokens found there.",
            "prompt_tokens": "Prompt tokens taken in.",
            "generation_tokens": "Output tokens.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {
            **{n: GaugeMetricFamily(f"evener_{n}", text, labels=labels) for n, text in gauges.items()},
            **{n: CounterMetricFamily(f"evener_{n}", text, labels=labels) for n, text in counters.items()},
        }
        for r in self._engine.status().replicas:
            values = {
                "num_requests_running": r.running,
                "num_requests_waiting": r.waiting,
                "kv_cache_usage_perc": (r.kv_blocks - r.kv_blocks_free) / r.kv_blocks if r.kv_blocks else 0.0,
                "batches_in_flight": r.in_flight,
                "replica_up": int(r.alive),
                "num_preemptions": r.preemptions,
                "prefix_cache_queries": r.prompt_tokens,
                "prefix_cache_hits": r.prefix_hit_tokens,
                "prompt_tokens": r.prompt_tokens,
                "generation_tokens": r.output_tokens,
            }
            for name, value in values.items():
                families[name].add_metric([self._model, str(r.replica)], value)
        return [*families.values(), *self._ledger()]

    def _ledger(self) -> list[Metric]:
        """Where every device-second went since the start; nothing where no ledger is kept."""
        try:
            account = self._engine.ledger().account()
        except Unavailable:
            return []
        place = ["model_name", "device", "replica", "stage"]
        seconds = CounterMetricFamily(
            "evener_device_seconds", "Device-seconds by cause; a device's causes sum to its wall time.",
            labels=[*place, "cause"],
        )  # fmt: skip
        achieved = GaugeMetricFamily(
            "evener_device_achieved_over_peak",
            "Least time of the work at the device's peak over compute time.",
            labels=place,
        )
        cpu = CounterMetricFamily("evener_device_cpu_seconds", "CPU time of what counts as compute.", labels=place)
        for name, device in account.devices.items():
            where = [self._model, name, str(device.replica), str(device.stage)]
            for cause, value in device.causes.items():
                seconds.add_metric([*where, cause], value)
            cpu.add_metric(where, device.cpu_s)
            if device.achieved_over_peak is not None:
                achieved.add_metric(where, device.achieved_over_peak)
        link = ["model_name", "replica", "stage", "op", "rows"]
        moved = CounterMetricFamily("evener_transfer_bytes", "Bytes that ranks put into operations.", labels=link)
        moving = CounterMetricFamily("evener_transfer_seconds", "Moving them, after all had arrived.", labels=link)
        for part in account.links:
            where = [self._model, str(part.replica), str(part.stage), part.op, part.rows]
            moved.add_metric(where, part.nbytes)
            moving.add_metric(where, part.moving_s)
        return [seconds, achieved, cpu, moved, moving]


def router(metrics: Metrics) -> APIRouter:
    """The endpoint."""
    routes = APIRouter()

    @routes.get("/metrics", responses={200: {"content": {"text/plain": {}}}}, response_class=Response)
    async def scrape(request: Request) -> Response:
        """Counters and latencies in Prometheus' text format."""
        return Response(metrics.render(), headers={"content-type": CONTENT_TYPE_LATEST})

    return routes
