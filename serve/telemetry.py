"""What a gateway measures. Label values are bounded."""

from __future__ import annotations

from collections.abc import Sequence

from lora_runtime.engine.protocol import AdapterRef, Usage
from serve.instruments import counter, histogram
from serve.targets import Target

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
TOKEN_SECONDS = (0.002, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)
BASE, COMBINATION, OTHER = "base", "combination", "other"


class TargetLabels:
    """Values of the label ``target``: "base", an adapter's name, or "combination".

    The first ``max_names`` adapters that are asked for keep their names and further ones are "other", so that no
    client can grow the number of series. Each process has its own first ones.
    """

    def __init__(self, max_names: int) -> None:
        self._max_names = max_names
        self._names: set[str] = set()

    def of(self, adapters: Sequence[AdapterRef]) -> str:
        if len(adapters) != 1:
            return COMBINATION if adapters else BASE
        name = adapters[0].name
        if name not in self._names and len(self._names) < self._max_names:
            self._names.add(name)
        return name if name in self._names else OTHER


class Metrics:
    """Counters and histograms of one gateway. Every method costs a few microseconds and is called once per request."""

    def __init__(self, max_names: int) -> None:
        """``max_names``: see :class:`TargetLabels`."""
        self._targets = TargetLabels(max_names)
        self._requests = counter("loom_requests", "Answered requests", ("route", "target", "status"))
        self._duration = histogram("loom_request_seconds", "Time to the end of an answer", SECONDS, ("route",))
        self._first = histogram(
            "loom_time_to_first_token_seconds", "Time to the first token, at the gateway", SECONDS, ("target",)
        )
        self._each = histogram(
            "loom_time_per_output_token_seconds",
            "Mean time between the tokens of a request, at the gateway",
            TOKEN_SECONDS,
            ("target",),
        )
        self._tokens = counter("loom_tokens", "Tokens of requests that ended well, by kind", ("kind", "target"))
        self._variants = counter(
            "loom_variant_requests",
            "Requests that an experiment answered",
            ("experiment", "variant", "assignment"),
        )
        self._shadows = counter(
            "loom_shadow_requests",
            "Copies for shadow arms: answered, dropped for want of room, or failed",
            ("experiment", "variant", "outcome"),
        )
        self._lost = counter(
            "loom_experiment_events_lost",
            "Events of experiments that were dropped while the registry was away",
        )

    def answered(self, route: str, target: Target, status: int, seconds: float) -> None:
        """One request ended."""
        self._requests.inc(1, {"route": route, "target": self._targets.of(target.adapters), "status": str(status)})
        self._duration.observe(seconds, {"route": route})

    def first_token(self, target: Target, seconds: float) -> None:
        self._first.observe(seconds, {"target": self._targets.of(target.adapters)})

    def used(self, target: Target, usage: Usage, decoding_s: float) -> None:
        """Tokens of one request; ``decoding_s`` from its first token to its last."""
        name = self._targets.of(target.adapters)
        for kind, tokens in (("prompt", usage.prompt_tokens), ("completion", usage.completion_tokens)):
            if tokens:
                self._tokens.inc(tokens, {"kind": kind, "target": name})
        if usage.completion_tokens > 1:
            self._each.observe(decoding_s / (usage.completion_tokens - 1), {"target": name})

    def assigned(self, experiment: str, variant: str, kind: str) -> None:
        """One request of an experiment was dispatched. Only people with keys for it name experiments."""
        self._variants.inc(1, {"experiment": experiment, "variant": variant, "assignment": kind})

    def mirrored(self, experiment: str, variant: str, outcome: str) -> None:
        """One copy for a shadow arm came to an end."""
        self._shadows.inc(1, {"experiment": experiment, "variant": variant, "outcome": outcome})

    def lost(self, count: int) -> None:
        """So many events of experiments were dropped."""
        if count:
            self._lost.inc(count)
