"""Counts and times of requests, for Prometheus."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import (
    CONTENT_TYPE_PLAIN_0_0_4,
    CollectorRegistry,
    Counter,
    Histogram,
    disable_created_metrics,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily
from prometheus_client.registry import Collector

#: Buckets of the response times in /metrics, in seconds.
LATENCY_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0)


class Metrics:
    """Counts and times of requests, as Prometheus reads them.

    Args:
        encoder_counts: Returns how many texts were encoded until now, in how many calls.
    """

    CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

    def __init__(self, encoder_counts: Callable[[], tuple[int, int]]) -> None:
        disable_created_metrics()  # a time of creation beside each series is of no use here
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "clipvisionalign_requests_total", "Requests by path and status.", ("path", "status"), registry=self.registry
        )
        self.seconds = Histogram(
            "clipvisionalign_request_seconds",
            "Seconds from a request to its answer.",
            ("path",),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.registry.register(_EncoderCollector(encoder_counts))

    def record(self, path: str, status: int, seconds: float) -> None:
        """Count a request that was answered.

        Args:
            path: Its route, not the path that was asked for.
            status: HTTP status of the answer.
            seconds: Time from the request to its answer.
        """
        self.requests.labels(path, str(status)).inc()
        self.seconds.labels(path).observe(seconds)

    def render(self) -> bytes:
        """The answer of /metrics.

        Returns:
            Text in Prometheus' format, as bytes.
        """
        return generate_latest(self.registry)


class _EncoderCollector(Collector):
    def __init__(self, encoder_counts: Callable[[], tuple[int, int]]) -> None:
        self.encoder_counts = encoder_counts

    def collect(self) -> Iterable[CounterMetricFamily]:
        texts, calls = self.encoder_counts()
        yield CounterMetricFamily("clipvisionalign_encoded_texts", "Texts that were encoded.", texts)
        yield CounterMetricFamily("clipvisionalign_encoder_calls", "Calls of the text encoder.", calls)
