"""Numbers for Prometheus: requests, times, tokens, and what every engine tells of itself."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

NOW = ("running", "waiting", "image_bytes", "prefix_bytes", "pixel_bytes", "parked_bytes")
"""Fields of an engine's statistics that go up and down; the others only grow."""
SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """One registry for each server.

    Args:
        engines: by the names of their models.
    """

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.registry = CollectorRegistry()
        new: dict[str, Any] = {"registry": self.registry}
        self.requests = Counter("chiasm_requests", "Requests answered.", ("path", "status"), **new)
        self.open = Gauge("chiasm_requests_open", "Requests that are here now.", **new)
        self.seconds = Histogram("chiasm_request_seconds", "Time of a request.", ("path",), buckets=SECONDS, **new)
        self.first = Histogram(
            "chiasm_first_token_seconds", "Time to an answer's first token.", ("model",), buckets=SECONDS, **new
        )
        self.vanished = Counter("chiasm_clients_vanished", "Clients that left before their answer.", **new)
        self.registry.register(_Engines(engines))

    def text(self) -> bytes:
        return generate_latest(self.registry)


class _Engines:
    """Statistics of engines, read whenever they are asked for."""

    def __init__(self, engines: Mapping[str, Any]) -> None:
        self.engines = engines

    def collect(self) -> Iterable[Metric]:
        families: dict[str, Any] = {}
        for model, engine in self.engines.items():
            for name, value in asdict(engine.stats()).items():
                if name not in families:
                    family = GaugeMetricFamily if name in NOW else CounterMetricFamily
                    families[name] = family(f"chiasm_engine_{name}", f"Of the engine: {name}.", labels=("model",))
                families[name].add_metric((model,), value)
        return families.values()
