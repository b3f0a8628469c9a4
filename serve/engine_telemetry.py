"""What an engine replica measures.

Quantities that vLLM also has go by vLLM's names and labels, spelled as vLLM's own Ray exporter spells them, whatever
the engine: ``vllm_time_to_first_token_seconds`` here is ``ray_vllm_time_to_first_token_seconds`` in Ray's dashboards.
Loom's own begin with ``loom_engine_``. Requests are observed once, when they end; nothing is done for each token.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

from ray.serve.exceptions import RayServeException
from ray.serve.metrics import Counter, Histogram

from lora_runtime.engine.protocol import AdapterRef, EngineStats, TokenEvent, Usage
from serve.background import ended
from serve.instruments import counter, gauge, histogram
from serve.telemetry import SECONDS, TOKEN_SECONDS, TargetLabels

SAMPLE_S = 1.0
"""Between two samples of the engine's state. Ray drops a gauge that was not set for two of its export intervals."""

LATENCY_SECONDS = (*SECONDS, 300, 600)
LENGTHS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000, 2_000, 5_000, 10_000, 20_000, 50_000, 100_000)

COUNTED = {
    "adapter_loads": "Adapters read into the engine",
    "adapter_load_seconds": "Time taken by reading adapters into the engine",
    "slot_hits": "Adapters of requests that were in a slot already",
    "slot_loads": "Adapters put into a slot",
    "slot_evictions": "Adapters that left a slot for another",
    "memory_evictions": "Adapters that left a slot because the memory for saved modules was needed",
    "image_encodings": "Images that went through the vision tower",
    "image_cache_hits": "Images whose encoding was still in memory",
    "steps": "Steps of the model",
    "step_seconds": "Time taken by steps of the model",
    "prompt_tokens": "Prompt tokens computed, also for requests that were cancelled",
    "generated_tokens": "Tokens generated, also for requests that were cancelled",
    "cancelled": "Requests cancelled in the engine",
    "finished": "Requests finished in the engine",
}
"""Descriptions of the engines' counters. One without a description is exported as well."""


@dataclass(slots=True)
class Seen:
    """One request at a replica, as it went. Times are of the monotonic clock."""

    adapters: Sequence[AdapterRef]
    begun: float = field(default_factory=time.monotonic)
    turn: float | None = None
    first: float | None = None
    last: float = 0.0
    num_tokens: int = 0
    usage: Usage | None = None
    reason: str = "stop"

    def has_turn(self) -> None:
        """It waits no longer; it is the engine's now."""
        self.turn = time.monotonic()

    def produced(self, events: Sequence[TokenEvent]) -> None:
        """These events came together."""
        self.last = time.monotonic()
        if self.first is None:
            self.first = self.last
        self.num_tokens += sum(len(event.tokens) for event in events)
        newest = events[-1]
        self.reason = newest.finish_reason or self.reason
        self.usage = newest.usage


class EngineMetrics:
    """Counters, histograms and gauges of one engine replica. Used from one event loop."""

    def __init__(self, model: str, max_names: int) -> None:
        """``model``: the base's name, for vLLM's label ``model_name``. ``max_names``: see TargetLabels."""
        self._targets = TargetLabels(max_names)
        tags = {"model_name": model, "engine": "0", "ReplicaId": _replica_id()}

        def seconds(name: str, description: str, boundaries: Sequence[float] = LATENCY_SECONDS) -> Histogram:
            return histogram(f"vllm_{name}_seconds", description, boundaries, fixed=tags)

        self._queue = seconds("request_queue_time", "Time until a request had its turn")
        self._first = seconds("time_to_first_token", "Time to the first token, at the engine", SECONDS)
        self._each = seconds(
            "request_time_per_output_token", "Mean time between the tokens of a request", TOKEN_SECONDS
        )
        self._prefill = seconds("request_prefill_time", "Time from a turn to the first token, with loading")
        self._decode = seconds("request_decode_time", "Time from the first token to the last")
        self._whole = seconds("e2e_request_latency", "Time of a request at the engine")
        self._prompts = histogram("vllm_request_prompt_tokens", "Prompt tokens of a request", LENGTHS, fixed=tags)
        self._answers = histogram("vllm_request_generation_tokens", "Tokens generated for it", LENGTHS, fixed=tags)
        self._prompt_tokens = counter("vllm_prompt_tokens", "Prompt tokens of requests that ended well", fixed=tags)
        self._generation_tokens = counter("vllm_generation_tokens", "Tokens sent by the engine", fixed=tags)
        self._success = counter(
            "vllm_request_success", "Requests by end: stop, length, abort or error", ("finished_reason",), tags
        )
        self._running = gauge("vllm_num_requests_running", "Requests inside the engine", fixed=tags)
        self._waiting = gauge("vllm_num_requests_waiting", "Requests waiting for a turn or for slots", fixed=tags)
        self._kv_usage = gauge("vllm_kv_cache_usage_perc", "Keys' and values' room in use, 0 to 1", fixed=tags)
        self._turns = histogram(
            "loom_engine_queue_seconds", "Time until a request had its turn, by target", SECONDS, ("target",)
        )
        self._slots = gauge("loom_engine_slots", "Slots for adapters: held by requests, idle, or free", ("state",))
        self._kv_used = gauge("loom_engine_kv_used_tokens", "Tokens whose keys and values are kept")
        self._kv_capacity = gauge("loom_engine_kv_capacity_tokens", "Tokens there is room for")
        self._counters: dict[str, tuple[Counter, float]] = {}

    @contextmanager
    def request(self, adapters: Sequence[AdapterRef]) -> Iterator[Seen]:
        """Count one request when the context ends, however it ends."""
        seen = Seen(adapters)
        try:
            yield seen
        except (GeneratorExit, asyncio.CancelledError):
            seen.reason = "abort"
            raise
        except BaseException:
            seen.reason = "error"
            raise
        finally:
            self._count(seen)

    def sample(self, stats: EngineStats, max_slots: int) -> None:
        """Export the engine's state, and what its counters grew by since the last sample."""
        used, capacity, resident = stats.kv_used_tokens, stats.kv_capacity_tokens, len(stats.resident)
        self._running.set(stats.running)
        self._waiting.set(stats.waiting)
        self._kv_usage.set(used / capacity if capacity else 0.0)
        self._kv_used.set(used)
        self._kv_capacity.set(capacity)
        states = {"held": stats.held_slots, "idle": resident - stats.held_slots, "free": max_slots - resident}
        for state, slots in states.items():
            self._slots.set(max(slots, 0), {"state": state})  # read while the engine changes them
        for name, value in stats.counters.items():
            grown, before = self._counters.get(name) or (_counter(name), 0.0)
            if value > before:
                grown.inc(value - before)
                self._counters[name] = grown, value

    def _count(self, seen: Seen) -> None:
        self._success.inc(1, {"finished_reason": seen.reason})
        self._whole.observe(time.monotonic() - seen.begun)
        if seen.turn is not None:
            self._queue.observe(seen.turn - seen.begun)
            self._turns.observe(seen.turn - seen.begun, {"target": self._targets.of(seen.adapters)})
        num_tokens = seen.num_tokens
        if seen.usage is not None:
            num_tokens = seen.usage.completion_tokens
            self._prompts.observe(seen.usage.prompt_tokens)
            self._answers.observe(num_tokens)
            if seen.usage.prompt_tokens:
                self._prompt_tokens.inc(seen.usage.prompt_tokens)
        if num_tokens:
            self._generation_tokens.inc(num_tokens)
        if seen.turn is not None and seen.first is not None:
            self._first.observe(seen.first - seen.begun)
            self._prefill.observe(seen.first - seen.turn)
            self._decode.observe(seen.last - seen.first)
            if seen.usage is not None and num_tokens > 1:
                self._each.observe((seen.last - seen.first) / (num_tokens - 1))


class Sampler:
    """Has the state of a started engine exported every second."""

    def __init__(self, metrics: EngineMetrics, stats: Callable[[], EngineStats]) -> None:
        self._metrics = metrics
        self._stats = stats
        self._task: asyncio.Task[None] | None = None
        self._max_slots = 0

    def start(self, max_slots: int) -> None:
        """Only inside an event loop."""
        self._max_slots = max_slots
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Exports what was counted since the last sample."""
        if self._task is not None:
            await ended(self._task)
            self._metrics.sample(self._stats(), self._max_slots)

    async def _run(self) -> None:
        while True:
            self._metrics.sample(self._stats(), self._max_slots)
            await asyncio.sleep(SAMPLE_S)


def _counter(name: str) -> Counter:
    return counter(f"loom_engine_{name}", COUNTED.get(name, name.replace("_", " ").capitalize()))


def _replica_id() -> str:
    """As vLLM's own Ray exporter has it; empty outside Ray Serve."""
    from ray import serve as ray_serve

    try:
        return str(ray_serve.get_replica_context().replica_id.unique_id)
    except RayServeException:
        return ""
