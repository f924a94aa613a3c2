"""What the router has measured, in Prometheus' text form. Names are vLLM's with "spts:" in place of "vllm:",
so that dashboards for it need that one change; what a method could explain has the label `method`."""

from __future__ import annotations

import time
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from cluster.protocol import Chunk, EngineStats, FinishReason

# Seconds. A long prompt on a small machine takes minutes, a token of a small model less than a millisecond.
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 600)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 60, 600)

# Kinds of `cluster.errors.HTTP_ERRORS` that say, also before an answer has begun, that it was taken in.
FAILURES = ("deadline", "internal")


class Metrics:
    """The series of one router. Engines are asked at every scrape; the rest is counted as it happens."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.time_to_first_token = self._histogram(
            "time_to_first_token_seconds", "From the request's arrival to its first token"
        )
        self.inter_token_latency = self._histogram(
            "inter_token_latency_seconds", "Between two tokens of an answer", TOKEN_BUCKETS
        )
        self.e2e_latency = self._histogram(
            "e2e_request_latency_seconds", "From the request's arrival to its last token"
        )
        self.queue_time = self._histogram(
            "request_queue_time_seconds", "From the engine's queue to the start of the prefill"
        )
        self.prefill_time = self._histogram(
            "request_prefill_time_seconds", "From the start of the prefill to the first token"
        )
        self.decode_time = self._histogram("request_decode_time_seconds", "From the first token to the last")
        self.prompt_tokens = self._counter("prompt_tokens", "Prompt tokens prefilled", "method")
        self.generation_tokens = self._counter("generation_tokens", "Tokens answered", "method")
        self.success = self._counter(
            "request_success",
            "Choices that came to their end, or whose client left (abort)",
            "method",
            "finished_reason",
        )
        self.rejections = self._counter(
            "admission_rejections", "Requests that got an error and no token, by its kind", "reason"
        )
        self.failures = self._counter(
            "request_failures",
            "Requests that failed in their answer, by the deadline, or by a bug, by the kind of error",
            "reason",
        )
        self.kv_tokens_kept = self._counter(
            "kv_tokens_kept", "Prompt tokens kept in the KV cache, summed over layers", "method"
        )
        self.kv_tokens_full = self._counter(
            "kv_tokens_full",
            "Prompt tokens that a dense prefill would have kept, summed over layers",
            "method",
        )
        self._gauges = {
            name: Gauge(f"spts:{name}", text, ["engine"], registry=self.registry)
            for name, text in (
                ("num_requests_running", "Requests in prefill or decoding"),
                ("num_requests_waiting", "Requests whose prefill has not begun"),
                ("num_requests_held", "Requests whose caches an engine's first rank has after a step"),
                ("num_documents_held", "Prompts' beginnings that an engine's first rank has after a step"),
                ("num_restarts", "How often the ranks of an engine have started again"),
                ("queued_prefill_tokens", "Prompt tokens of the requests whose prefill has not ended"),
                ("kv_cache_bytes", "Bytes of the running requests' KV caches"),
                ("kv_reserved_bytes", "Bytes that requests in prefill or decoding may take at most"),
                ("kv_document_bytes", "Bytes of what is kept of prompts for others that begin alike"),
                (
                    "kv_cache_usage_perc",
                    "Share of the KV memory that is reserved or holds documents, 1 = all",
                ),
            )
        }

    def fail(self, kind: str, *, begun: bool = False) -> None:
        """Count a request that got an error. kind: a key of `cluster.errors.HTTP_ERRORS`. begun: its answer
        had begun."""
        (self.failures if begun or kind in FAILURES else self.rejections).labels(reason=kind).inc()

    def text(self, engines: Mapping[str, EngineStats]) -> bytes:
        """Everything, in Prometheus' text form. engines: those that answered; the others have no gauges."""
        for gauge in self._gauges.values():
            gauge.clear()
        for name, stats in engines.items():
            values: dict[str, float] = {
                "num_requests_running": stats.running,
                "num_requests_waiting": stats.waiting,
                "num_requests_held": stats.held_requests,
                "num_documents_held": stats.held_documents,
                "num_restarts": stats.restarts,
                "queued_prefill_tokens": stats.queued_prefill_tokens,
                "kv_cache_bytes": stats.kv_bytes,
                "kv_reserved_bytes": stats.reserved_bytes,
                "kv_document_bytes": stats.document_bytes,
            }
            if stats.kv_bytes_limit is not None:
                in_use = stats.reserved_bytes + stats.document_bytes
                values["kv_cache_usage_perc"] = in_use / stats.kv_bytes_limit
            for key, value in values.items():
                self._gauges[key].labels(engine=name).set(value)
        return generate_latest(self.registry)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...] = REQUEST_BUCKETS) -> Histogram:
        return Histogram(f"spts:{name}", text, ["method"], buckets=buckets, registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"spts:{name}", text, labels, registry=self.registry)


class ChoiceClock:
    """The times of one choice, as its chunks come. arrived: of its HTTP request, perf_counter()."""

    def __init__(self, metrics: Metrics, method: str, arrived: float) -> None:
        self._metrics = metrics
        self._method = method
        self._arrived = arrived
        self._sent = self._first = self._latest = 0.0
        self.ended = False

    def send(self) -> None:
        """The choice's own request goes to the engine now; what its echo took is not its prefill."""
        self._sent = time.perf_counter()

    def chunk(self, chunk: Chunk) -> None:
        """Count a chunk that has just come."""
        metrics, now = self._metrics, time.perf_counter()
        if chunk.prefilled is not None:
            done = chunk.prefilled
            queue_s = chunk.queue_s or 0.0
            metrics.time_to_first_token.labels(self._method).observe(now - self._arrived)
            metrics.queue_time.labels(self._method).observe(queue_s)
            metrics.prefill_time.labels(self._method).observe(max(0.0, now - self._sent - queue_s))
            prompt_tokens = done.work[0].candidates
            metrics.prompt_tokens.labels(self._method).inc(prompt_tokens)
            metrics.kv_tokens_kept.labels(self._method).inc(done.kv_tokens)
            metrics.kv_tokens_full.labels(self._method).inc(prompt_tokens * len(done.work))
            self._first = now
        else:
            metrics.inter_token_latency.labels(self._method).observe(now - self._latest)
        metrics.generation_tokens.labels(self._method).inc(len(chunk.token_ids))
        self._latest = now

    def end(self, reason: FinishReason) -> None:
        """Count the end of the answer."""
        metrics = self._metrics
        metrics.e2e_latency.labels(self._method).observe(self._latest - self._arrived)
        metrics.decode_time.labels(self._method).observe(self._latest - self._first)
        metrics.success.labels(self._method, reason).inc()
        self.ended = True

    def abort(self) -> None:
        """The client has left; counted if the answer had not ended. The name of the reason is vLLM's."""
        if not self.ended:
            self._metrics.success.labels(self._method, "abort").inc()
