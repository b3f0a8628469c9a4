"""What is counted of a request, and by which labels."""

from __future__ import annotations

import asyncio
import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from lora_runtime.engine.protocol import AdapterRef, EngineStats, TokenEvent, Usage
from lora_runtime.errors import EngineFault, Overloaded
from serve import engine_telemetry, telemetry
from serve.engine_telemetry import EngineMetrics
from serve.targets import Target
from serve.telemetry import Metrics


@dataclass
class Book:
    """What was counted, by name and labels; how often histograms were observed, by name."""

    counted: Counter[tuple[str, tuple[tuple[str, str], ...]]] = field(default_factory=Counter)
    observed: Counter[str] = field(default_factory=Counter)
    gauges: dict[tuple[str, tuple[tuple[str, str], ...]], float] = field(default_factory=dict)

    def make(self, name: str, *_: Any, **__: Any) -> Any:
        book = self

        class Instrument:
            def inc(self, value: float = 1, labels: dict[str, str] | None = None) -> None:
                assert value > 0, "Ray refuses an increment of zero"
                book.counted[name, tuple(sorted((labels or {}).items()))] += value

            def observe(self, value: float, labels: dict[str, str] | None = None) -> None:
                assert value >= 0
                book.observed[name] += 1

            def set(self, value: float, labels: dict[str, str] | None = None) -> None:
                book.gauges[name, tuple(sorted((labels or {}).items()))] = value

        return Instrument()

    def total(self, name: str, **labels: str) -> float:
        return sum(
            value
            for (found, tags), value in self.counted.items()
            if found == name and labels.items() <= dict(tags).items()
        )


@pytest.fixture
def book(monkeypatch: pytest.MonkeyPatch) -> Book:
    made = Book()
    for module in (telemetry, engine_telemetry):
        for kind in ("counter", "gauge", "histogram"):
            monkeypatch.setattr(module, kind, made.make, raising=False)
    return made


def ref(name: str) -> AdapterRef:
    return AdapterRef(version=name * 8, path="/", name=name)


def target(*names: str) -> Target:
    return Target("label", tuple(ref(name) for name in names))


def test_adapters_beyond_the_limit_are_counted_together(book: Book):
    metrics = Metrics(max_names=2)
    for names in ((), ("one",), ("two",), ("three",), ("four",), ("one",), ("one", "two")):
        metrics.answered("chat", target(*names), 200, 0.1)
    counted = {
        name: book.total("loom_requests", target=name) for name in ("base", "one", "two", "other", "combination")
    }
    assert counted == {"base": 1, "one": 2, "two": 1, "other": 2, "combination": 1}
    assert book.total("loom_requests") == book.observed["loom_request_seconds"] == 7


def test_an_answer_without_tokens_counts_none(book: Book):
    Metrics(max_names=1).used(target("one"), Usage(prompt_tokens=4, completion_tokens=0), 0.0)
    assert book.total("loom_tokens") == book.total("loom_tokens", kind="prompt") == 4


def event(usage: Usage | None = None, reason: Any = None) -> TokenEvent:
    return TokenEvent(choice=0, text="a", tokens=(), finish_reason=reason, usage=usage)


@pytest.mark.parametrize(
    ("raised", "reason"),
    [
        (None, "length"),
        (GeneratorExit(), "abort"),
        (asyncio.CancelledError(), "abort"),
        (EngineFault("broke"), "error"),
    ],
)
def test_a_request_is_counted_once_however_it_ends(book: Book, raised: BaseException | None, reason: str):
    metrics = EngineMetrics("base", max_names=2)
    try:
        with metrics.request((ref("one"),)) as seen:
            seen.has_turn()
            seen.produced([event()])
            if raised is not None:
                raise raised
            seen.produced([event(), event(Usage(prompt_tokens=5, completion_tokens=3), "length")])
    except BaseException as error:
        assert error is raised
    assert book.total("vllm_request_success", finished_reason=reason) == book.total("vllm_request_success") == 1
    for name in ("time_to_first_token_seconds", "e2e_request_latency_seconds", "request_queue_time_seconds"):
        assert book.observed[f"vllm_{name}"] == 1, name
    ended_well = raised is None
    assert book.observed["vllm_request_time_per_output_token_seconds"] == ended_well
    assert book.total("vllm_prompt_tokens") == 5 * ended_well and book.total("vllm_generation_tokens") == 3 * ended_well


def test_a_request_that_never_had_its_turn_has_no_times_of_one(book: Book):
    with pytest.raises(Overloaded), EngineMetrics("base", max_names=2).request(()):
        raise Overloaded("full", retry_after_s=1)
    assert book.total("vllm_request_success", finished_reason="error") == 1
    assert set(book.observed) == {"vllm_e2e_request_latency_seconds"}


def stats(**counters: float) -> EngineStats:
    return EngineStats(
        running=2,
        waiting=3,
        resident=("a", "b"),
        held_slots=1,
        kv_used_tokens=25,
        kv_capacity_tokens=100,
        counters=counters,
    )


def test_an_engines_counters_are_exported_by_what_they_grew(book: Book):
    metrics = EngineMetrics("base", max_names=2)
    for found in (stats(adapter_loads=2, steps=0), stats(adapter_loads=2, steps=7), stats(adapter_loads=3, steps=9)):
        metrics.sample(found, max_slots=8)
    assert book.total("loom_engine_adapter_loads") == 3 and book.total("loom_engine_steps") == 9
    assert book.gauges["vllm_kv_cache_usage_perc", ()] == 0.25
    slots = {state: book.gauges["loom_engine_slots", (("state", state),)] for state in ("held", "idle", "free")}
    assert slots == {"held": 1, "idle": 1, "free": 6}


@pytest.mark.vllm
@pytest.mark.skipif(find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllms_names_are_vllms(monkeypatch: pytest.MonkeyPatch):
    loggers = Path(find_spec("vllm").origin).parent / "v1" / "metrics" / "loggers.py"
    named: dict[str, set[str]] = {}

    def make(name: str, _: str, *arguments: Any, fixed: dict[str, str] | None = None) -> None:
        labels = {label for found in arguments if not all(isinstance(x, int | float) for x in found) for label in found}
        named[name] = labels | set(fixed or ())

    for kind in ("counter", "gauge", "histogram"):
        monkeypatch.setattr(engine_telemetry, kind, make)
    EngineMetrics("base", max_names=1)
    ours = {name.removeprefix("vllm_"): labels for name, labels in named.items() if name.startswith("vllm_")}
    assert len(ours) == 14 and all({"model_name", "engine", "ReplicaId"} <= labels for labels in ours.values())
    assert "finished_reason" in ours["request_success"]
    theirs = set(re.findall(r'name="vllm:(\w+)"', loggers.read_text()))
    assert set(ours) <= theirs, set(ours) - theirs
