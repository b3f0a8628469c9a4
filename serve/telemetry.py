"""What is measured: Prometheus metrics of one gateway process. Label values are bounded."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_runtime.engine.protocol import EngineStats, Usage

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """Counters and histograms, and the last look at the engines."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "loom_requests", "Answered requests", ["route", "target", "status"], registry=self._registry
        )
        self._duration = Histogram(
            "loom_request_seconds", "Time to the end of an answer", ["route"], buckets=SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "loom_time_to_first_token_seconds", "Time to the first token", buckets=SECONDS, registry=self._registry
        )
        self._tokens = Counter("loom_tokens", "Tokens by kind", ["kind"], registry=self._registry)
        self._engine = Gauge(
            "loom_engine", "State and counters of one engine replica", ["value"], registry=self._registry
        )

    def answered(self, route: str, num_members: int, status: int, seconds: float) -> None:
        """One request ended; ``num_members`` of its target."""
        target = ("base", "adapter")[num_members] if num_members < 2 else "combination"
        self._requests.labels(route, target, str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_token(self, seconds: float) -> None:
        self._first.observe(seconds)

    def used(self, usage: Usage) -> None:
        self._tokens.labels("prompt").inc(usage.prompt_tokens)
        self._tokens.labels("completion").inc(usage.completion_tokens)

    def exposition(self, engines: Sequence[EngineStats]) -> bytes:
        """Prometheus text; engine values are sums over ``engines``."""
        for name in ("running", "waiting", "held_slots", "kv_used_tokens", "kv_capacity_tokens"):
            self._engine.labels(name).set(sum(getattr(stats, name) for stats in engines))
        for name in sorted({name for stats in engines for name in stats.counters}):
            self._engine.labels(name).set(sum(stats.counters.get(name, 0) for stats in engines))
        return generate_latest(self._registry)
