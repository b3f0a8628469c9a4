"""What an operator sees of a request: metrics, a trace from gateway to engine, and log lines without its content."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import httpx
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.fakes import write_fake_adapter
from tests.served import Served, served

SECRET = "xylophone"
TRACE = "0af7651916cd43dd8448eb211c80319c"


class Collector(ThreadingHTTPServer):
    """An OpenTelemetry collector: it keeps what it is sent."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Receiver)
        self.received: list[tuple[str, object]] = []

    def spans(self, trace: str) -> dict[str, object]:
        """Spans of a trace, by service and name."""
        return {f"{service}: {span.name}": span for service, span in self.received if span.trace_id.hex() == trace}


class _Receiver(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.headers.get("Content-Encoding") == "gzip":
            import gzip

            body = gzip.decompress(body)
        assert SECRET.encode() not in body
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            names = {a.key: a.value.string_value for a in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.received += [(names["service.name"], span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Quietly."""


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    opened = Collector()
    Thread(target=opened.serve_forever, daemon=True).start()
    yield opened
    opened.shutdown()


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("watched")
    for name in ("one", "two", "three"):
        write_fake_adapter(folder / name, name=name)
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01}},
        "adapters": {"roots": [str(folder)], "preload": {n: str(folder / n) for n in ("one", "two", "three")}},
        "telemetry": {
            "otlp_endpoint": f"http://127.0.0.1:{collector.server_address[1]}/v1/traces",
            "adapter_labels": 2,
        },
    }
    with served(folder, settings) as running:
        yield running


def ask(watched: Served, model: str, text: str = "hi", **headers: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 3}
    return httpx.post(f"{watched.url}/v1/chat/completions", json=body, headers=headers, timeout=30)


def test_a_trace_goes_from_the_caller_through_the_gateway_to_the_engine(watched: Served, collector: Collector):
    ask(watched, "one:2+two", SECRET, traceparent=f"00-{TRACE}-b7ad6b7169203331-01").raise_for_status()
    outer, inner = "loom-gateway: POST /v1/chat/completions", "loom-engine: engine.generate"
    deadline = time.monotonic() + 20
    while not {outer, inner} <= set(collector.spans(TRACE)):
        assert time.monotonic() < deadline, collector.received
        time.sleep(0.2)
    spans = collector.spans(TRACE)
    assert spans[outer].parent_span_id.hex() == "b7ad6b7169203331"
    assert spans[inner].parent_span_id == spans[outer].span_id
    assert [event.name for event in spans[inner].events] == ["turn", "first tokens"]
    assert {a.key: a.value.int_value for a in spans[inner].attributes}["adapters"] == 2


def test_metrics_name_adapters_and_no_more_of_them_than_may_be(watched: Served):
    for model in ("one", "two", "three", "three", "base", "one+two"):
        ask(watched, model).raise_for_status()
    text = httpx.get(f"{watched.url}/metrics").text
    counted = dict(re.findall(r'loom_requests_total\{route="chat",status="200",target="(\S+)"\} (\S+)', text))
    assert set(counted) == {"one", "two", "other", "base", "combination"} and float(counted["other"]) == 2
    for name in ("loom_time_to_first_token_seconds", "loom_time_per_output_token_seconds"):
        assert float(re.search(rf'{name}_count\{{target="one"\}} (\S+)', text)[1]) >= 1
    assert float(re.search(r'loom_tokens_total\{kind="completion",target="one"\} (\S+)', text)[1]) == 3
    assert "loom_engine_replicas 1.0" in text


def logs(watched: Served) -> dict[Path, str]:
    """What the service's processes have written, by file."""
    files = set()
    for process in watched.family():
        for number in (1, 2):
            target = Path(f"/proc/{process.pid}/fd/{number}").resolve()
            if target.is_file():
                files.add(target)
    folders = {file.parent for file in files if "session_" in str(file)}
    files |= {file for folder in folders for file in folder.rglob("*") if file.is_file()}
    return {file: file.read_text(errors="replace") for file in files}


def test_log_lines_carry_the_requests_id_and_never_its_content(watched: Served):
    key = "loom_000000000000_" + "k" * 43
    answered = ask(watched, "one", SECRET, **{"X-Request-Id": "find-me", "Authorization": f"Bearer {key}"})
    assert SECRET in answered.json()["choices"][0]["message"]["content"]
    refused = {"model": "one", "messages": [{"role": "user", "content": SECRET, "wrong": SECRET}]}
    assert httpx.post(f"{watched.url}/v1/chat/completions", json=refused).status_code == 400
    time.sleep(0.5)
    found = logs(watched)
    lines = [line for text in found.values() for line in text.splitlines() if '"find-me"' in line]
    said = [json.loads(line) for line in lines if line.startswith("{")]
    (line,) = [line for line in said if line.get("message") == "request"]
    assert (line["status"], line["model"], line["path"], line["level"]) == (200, "one", "/v1/chat/completions", "INFO")
    for file, text in found.items():
        assert SECRET not in text and "k" * 43 not in text, file
