"""What an operator sees of a request: metrics, a trace from gateway to engine, and log lines without its content."""

from __future__ import annotations

import json
import random
import socket
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Event, Thread
from typing import Any

import httpx
import psutil
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.fakes import write_fake_adapter
from tests.metrics import Scrape, Series, eventually, scrape
from tests.served import METRICS_S, Served, served

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
    before = scrape(watched.url)
    for model in ("one", "two", "three", "three", "base", "one+two"):
        ask(watched, model).raise_for_status()
    answered = before.total("loom_requests_total") + 6
    found = eventually(watched.url, lambda found: found.total("loom_requests_total") >= answered)
    assert found.values_of("target", "loom_requests_total") == {"one", "two", "other", "base", "combination"}
    assert found.total("loom_requests_total", target="other", route="chat", status="200") == 2
    assert found.total("loom_tokens_total", kind="completion", target="other") == 6
    for name in ("loom_time_to_first_token_seconds", "loom_time_per_output_token_seconds"):
        assert found.total(f"{name}_count", target="other") == 2


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


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Two gateways before two engines."""
    folder = tmp_path_factory.mktemp("pair")
    write_fake_adapter(folder / "one", name="one")
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.01}},
        "gateways": {"replicas": 2},
        "engines": {"replicas": 2, "num_cpus": 0.5},
        "adapters": {"roots": [str(folder)], "preload": {"one": str(folder / "one")}},
    }
    with served(folder, settings) as running:
        yield running


def node_metrics(running: Served) -> Scrape:
    """What Ray exports at the node's metrics port, which is one of the ports that the service's processes listen at."""
    for process in running.family():
        with suppress(psutil.Error):  # it has just ended
            listening = [c.laddr for c in process.net_connections(kind="tcp") if c.status == psutil.CONN_LISTEN]
            for address in {f"127.0.0.1:{laddr.port}" for laddr in listening}:
                with suppress(httpx.HTTPError):  # most of them speak gRPC
                    text = httpx.get(f"http://{address}/metrics", timeout=2).text
                    if "ray_loom_requests_total" in text:
                        return Scrape(text)
    raise AssertionError("no process of the service exports Ray's metrics")


class Watch:
    """Scrapes all the while, and keeps what must never happen: a count that shrinks, or a series that goes away."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._is_over = Event()
        self._thread = Thread(target=self._look)
        self.num_looks = self.num_failed = 0
        self.wrong: list[str] = []

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _look(self) -> None:
        before: dict[Series, float] = {}
        while not self._is_over.wait(0.15):
            try:
                found = scrape(self._url)
            except httpx.HTTPError:
                self.num_failed += 1
                continue
            now = {series: found.values[series] for series in found.growing}
            self.wrong += [f"{s}: {v}, then {now.get(s)}" for s, v in before.items() if now.get(s, -1.0) < v]
            before, self.num_looks = now, self.num_looks + 1


NUM_REQUESTS = 120


@pytest.mark.slow
def test_counts_are_true_with_several_gateways_and_engines(pair: Served):
    def one(number: int) -> None:
        body = {"model": ("base", "one")[number % 2], "prompt": "a b c", "max_tokens": 3, "stream": number % 3 == 0}
        httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).raise_for_status()

    with Watch(pair.url) as watch, ThreadPoolExecutor(8) as pool:
        list(pool.map(one, range(NUM_REQUESTS)))
        eventually(pair.url, lambda found: found.total("vllm:request_success_total") >= NUM_REQUESTS)
        eventually(pair.url, lambda found: found.total("loom_requests_total") >= NUM_REQUESTS)
        time.sleep(3 * METRICS_S)
    assert watch.num_looks > 10 and watch.num_failed == 0 and watch.wrong == []
    found = scrape(pair.url)
    assert len(found.values_of("replica", "loom_requests_total")) == 2
    assert len(found.values_of("replica", "vllm:request_success_total")) == 2
    counts = {
        "loom_requests_total": NUM_REQUESTS,
        "loom_request_seconds_count": NUM_REQUESTS,
        "loom_time_to_first_token_seconds_count": NUM_REQUESTS,
        "loom_time_per_output_token_seconds_count": NUM_REQUESTS,
        "vllm:request_success_total": NUM_REQUESTS,
        "vllm:time_to_first_token_seconds_count": NUM_REQUESTS,
        "vllm:request_time_per_output_token_seconds_count": NUM_REQUESTS,
        "vllm:e2e_request_latency_seconds_count": NUM_REQUESTS,
        "vllm:generation_tokens_total": 3 * NUM_REQUESTS,
        "vllm:prompt_tokens_total": 4 * NUM_REQUESTS,
        "loom_engine_finished_total": NUM_REQUESTS,
    }
    assert {name: found.total(name) for name in counts} == counts
    assert found.total("loom_tokens_total", kind="completion") == 3 * NUM_REQUESTS
    assert found.total("loom_requests_total", target="one", status="200") == NUM_REQUESTS / 2
    assert found.values_of("model_name", "vllm:num_requests_running") == {"base"}
    at_node = node_metrics(pair)
    for name, count in counts.items():
        assert at_node.total("ray_" + name.replace(":", "_")) == count, name


def leave(url: str, request_id: str, body: dict[str, Any], *, sends: float, reads: int) -> None:
    """Ask, and close the connection: after the share ``sends`` of the body is sent and ``reads`` bytes have come."""
    server, content = httpx.URL(url), json.dumps(body).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {server.host}\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: {request_id}\r\nContent-Length: {len(content)}\r\n\r\n"
    )
    with socket.create_connection((server.host, server.port), timeout=60) as connection:
        connection.sendall(head.encode() + content[: round(sends * len(content))])
        if reads:
            assert connection.recv(reads)
        else:
            time.sleep(random.random() / 20)


@pytest.mark.slow
def test_clients_that_leave_are_no_errors(pair: Served):
    """At every moment, by the hundred. One that leaves before a gateway has heard of it leaves no line at all."""
    text = [{"role": "user", "content": "a b c"}]
    slow = {"model": "base", "messages": text, "max_tokens": 200}
    moments = {
        "body": {"body": slow, "sends": 0.5, "reads": 0},
        "waits": {"body": slow, "sends": 1, "reads": 0},
        "begins": {"body": {**slow, "stream": True}, "sends": 1, "reads": 0},
        "midway": {"body": {**slow, "stream": True}, "sends": 1, "reads": 400},
    }
    asked = [(f"left-{name}-{number}", moment) for number in range(75) for name, moment in moments.items()]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda each: leave(pair.url, each[0], **each[1]), asked))
    ask(pair, "one", **{"X-Request-Id": "stayed"}).raise_for_status()
    eventually(pair.url, lambda found: found.total("vllm:num_requests_running") == 0)
    time.sleep(1)
    found = {file: text for file, text in logs(pair).items() if file.parent.name == "serve" or file.match("worker-*")}
    assert any(file.parent.name == "serve" for file in found) and any(file.suffix == ".err" for file in found)
    for file, text in found.items():
        assert "Traceback" not in text and "ERROR" not in text, f"{file}: {text[-3000:]}"
    lines = [
        json.loads(line) for text in found.values() for line in text.splitlines() if '"message": "request"' in line
    ]
    statuses = defaultdict(list)
    for line in lines:
        statuses[line["request_id"]].append(line["status"])
    assert statuses["stayed"] == [200]
    left = {name: found for name, found in statuses.items() if name.startswith("left-")}
    assert set(map(tuple, left.values())) == {(499,)}
    assert {f"left-midway-{number}" for number in range(75)} <= left.keys()


@pytest.mark.slow
def test_counts_outlive_the_replica_that_counted(pair: Served):
    """A gateway is killed: what it had exported stays, and what its successor counts comes on top."""
    before = scrape(pair.url).total("loom_requests_total", route="completions", status="200")
    killed, *_ = found = gateways(pair)
    replicas = {process.pid for process in found}
    with Watch(pair.url) as watch:
        killed.kill()
        deadline = time.monotonic() + 60
        while not {process.pid for process in gateways(pair)} - replicas:
            assert time.monotonic() < deadline, "no gateway took its place"
            time.sleep(0.2)
        time.sleep(3 * METRICS_S)
    assert watch.num_looks > 10 and watch.wrong == []
    body = {"model": "base", "prompt": "a b c", "max_tokens": 3}
    for _ in range(10):
        httpx.post(f"{pair.url}/v1/completions", json=body, timeout=60).raise_for_status()
    wanted = {"route": "completions", "status": "200"}
    eventually(pair.url, lambda found: found.total("loom_requests_total", **wanted) == before + 10)


def gateways(running: Served) -> list[psutil.Process]:
    found = []
    for process in running.family():
        with suppress(psutil.Error):  # it has just ended
            if " ".join(process.cmdline()).startswith("ray::ServeReplica:loom:Gateway"):
                found.append(process)
    return found
