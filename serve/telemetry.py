"""What is measured: Prometheus metrics of one gateway process. Label values are bounded."""

from __future__ import annotations

from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from lora_runtime.engine.protocol import EngineStats, Usage
from serve.targets import Target

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1)
OTHER = "other"


class Metrics:
    """Counters and histograms, and the last look at the engines.

    A target is "base", an adapter's name, or "combination"; the first ``max_names`` adapters that are asked for have
    their own, further ones are "other", so that no client can grow what a scrape returns.
    """

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._names: set[str] = set()
        self._registry = CollectorRegistry()
        self._requests = Counter(
            "loom_requests", "Answered requests", ["route", "target", "status"], registry=self._registry
        )
        self._duration = Histogram(
            "loom_request_seconds", "Time to the end of an answer", ["route"], buckets=SECONDS, registry=self._registry
        )
        self._first = Histogram(
            "loom_time_to_first_token_seconds",
            "Time to the first token",
            ["target"],
            buckets=SECONDS,
            registry=self._registry,
        )
        self._each = Histogram(
            "loom_time_per_output_token_seconds",
            "Time between tokens, a request's mean",
            ["target"],
            buckets=TOKEN_SECONDS,
            registry=self._registry,
        )
        self._tokens = Counter("loom_tokens", "Tokens by kind", ["kind", "target"], registry=self._registry)
        self._variants = Counter(
            "loom_variant_requests",
            "Requests that an experiment answered",
            ["experiment", "variant", "assignment"],
            registry=self._registry,
        )
        self._shadows = Counter(
            "loom_shadow_requests",
            "Copies for shadow arms: answered, dropped for want of room, or failed",
            ["experiment", "variant", "outcome"],
            registry=self._registry,
        )
        self._lost = Counter(
            "loom_experiment_events_lost",
            "Events of experiments that were dropped while the registry was away",
            registry=self._registry,
        )
        self._engine = Gauge(
            "loom_engine", "State and counters of all engine replicas together", ["value"], registry=self._registry
        )
        self._replicas = Gauge("loom_engine_replicas", "Engine replicas that answer", registry=self._registry)

    def answered(self, route: str, target: Target, status: int, seconds: float) -> None:
        """One request ended."""
        self._requests.labels(route, self._name(target), str(status)).inc()
        self._duration.labels(route).observe(seconds)

    def first_token(self, target: Target, seconds: float) -> None:
        self._first.labels(self._name(target)).observe(seconds)

    def used(self, target: Target, usage: Usage, decoding_s: float) -> None:
        """Tokens of one request; ``decoding_s`` from its first token to its last."""
        name = self._name(target)
        self._tokens.labels("prompt", name).inc(usage.prompt_tokens)
        self._tokens.labels("completion", name).inc(usage.completion_tokens)
        if usage.completion_tokens > 1:
            self._each.labels(name).observe(decoding_s / (usage.completion_tokens - 1))

    def assigned(self, experiment: str, variant: str, kind: str) -> None:
        """One request of an experiment was dispatched. Only people with keys for it name experiments."""
        self._variants.labels(experiment, variant, kind).inc()

    def mirrored(self, experiment: str, variant: str, outcome: str) -> None:
        """One copy for a shadow arm came to an end."""
        self._shadows.labels(experiment, variant, outcome).inc()

    def lost(self, count: int) -> None:
        """So many events of experiments were dropped."""
        self._lost.inc(count)

    def exposition(self, engines: Sequence[EngineStats]) -> bytes:
        """Prometheus text; engine values are sums over ``engines``."""
        self._replicas.set(len(engines))
        for name in ("running", "waiting", "held_slots", "kv_used_tokens", "kv_capacity_tokens"):
            self._engine.labels(name).set(sum(getattr(stats, name) for stats in engines))
        for name in sorted({name for stats in engines for name in stats.counters}):
            self._engine.labels(name).set(sum(stats.counters.get(name, 0) for stats in engines))
        return generate_latest(self._registry)

    def _name(self, target: Target) -> str:
        if len(target.adapters) != 1:
            return "combination" if target.adapters else "base"
        name = target.adapters[0].name
        if name not in self._names and len(self._names) < self._max_names:
            self._names.add(name)
        return name if name in self._names else OTHER
