"""Traces from the gateway to the engine, sent over OTLP where a collector is configured, made nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from opentelemetry import trace
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from serve.config import TelemetrySettings

_PROPAGATOR = TraceContextTextMapPropagator()
HEADER = "traceparent"


class Tracing:
    """Spans of one process, named by its ``role``. Without a collector, spans cost next to nothing and go nowhere."""

    def __init__(self, settings: TelemetrySettings, role: str) -> None:
        self._provider: TracerProvider | None = None
        if settings.otlp_endpoint is None:
            self._tracer: trace.Tracer = trace.NoOpTracer()
            return
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter

        sampler = ParentBased(TraceIdRatioBased(settings.trace_share))
        self._provider = TracerProvider(sampler=sampler, resource=Resource({"service.name": f"loom-{role}"}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(settings.otlp_endpoint.get_secret_value())))
        self._tracer = self._provider.get_tracer("loom")

    def start(self, name: str, traceparent: str, **attributes: str | int | float) -> Span:
        """A span under ``traceparent``, which the caller ends. ``attributes`` say nothing of prompts or answers."""
        parent = _PROPAGATOR.extract({HEADER: traceparent}) if traceparent else None
        return self._tracer.start_span(name, context=parent, attributes=attributes)

    @contextmanager
    def span(self, name: str, traceparent: str, **attributes: str | int | float) -> Iterator[Span]:
        """The same around a context, where it is the current span."""
        span = self.start(name, traceparent, **attributes)
        with trace.use_span(span, end_on_exit=True, record_exception=False, set_status_on_exception=False):
            yield span

    def close(self) -> None:
        """Send what is left."""
        if self._provider is not None:
            self._provider.shutdown()


def traceparent() -> str:
    """The current span as W3C's header says it; empty where none is recorded."""
    carrier: dict[str, str] = {}
    _PROPAGATOR.inject(carrier)
    return carrier.get(HEADER, "")
