"""Clients that hold back what they announced, or leave: others are served, and every place comes back."""

from __future__ import annotations

import json
import socket
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import httpx
import pytest

from tests.metrics import RUNNING, WAITING, eventually
from tests.served import Served, served

pytestmark = pytest.mark.slow

PLACES = 40
BODY_TIMEOUT_S = 3
NUM_STREAMS = 300


@pytest.fixture(scope="module")
def flooded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A service with few places, and little patience with bodies."""
    settings = {
        "base": {"name": "base"},
        "server": {"body_timeout_s": BODY_TIMEOUT_S},
        "gateways": {"max_ongoing_requests": PLACES},
        "engine": {"kind": "fake", "options": {"token_s": 0.02, "max_running": 500, "max_model_len": 100_000}},
        "adapters": {"roots": [], "preload": {}},
    }
    with served(tmp_path_factory.mktemp("flooded"), settings) as running:
        yield running


def head(path: str, length: int, *lines: str, method: str = "POST") -> bytes:
    said = ["Host: loom", "Content-Type: application/json", f"Content-Length: {length}", *lines]
    return "\r\n".join([f"{method} {path} HTTP/1.1", *said, "", ""]).encode("latin-1")


@contextmanager
def connections(running: Served, count: int, sent: bytes) -> Iterator[list[socket.socket]]:
    """So many connections, each with ``sent`` on its way."""
    port = httpx.URL(running.url).port
    with ExitStack() as stack:
        opened = []
        for _ in range(count):
            opened.append(stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60)))
            opened[-1].sendall(sent)
        yield opened


def answered(connection: socket.socket) -> tuple[int, dict[str, list[str]]]:
    """Status and headers of the answer that comes, or has come."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        assert chunk, f"closed after {received!r}"
        received += chunk
    status, *lines = received.split(b"\r\n\r\n")[0].decode("latin-1").split("\r\n")
    headers: dict[str, list[str]] = {}
    for line in lines:
        name, _, value = line.partition(":")
        headers.setdefault(name.lower(), []).append(value.strip())
    return int(status.split()[1]), headers


def statuses(opened: list[socket.socket]) -> Counter[int]:
    return Counter(answered(connection)[0] for connection in opened)


@pytest.mark.parametrize(("path", "status"), [("/healthz", 405), ("/v1/nothing", 404), ("/v1/models", 405)])
def test_bodies_that_no_route_takes_hold_no_place(flooded: Served, path: str, status: int):
    with connections(flooded, 2 * PLACES, head(path, 1000) + b"{") as opened:
        assert httpx.get(f"{flooded.url}/healthz", timeout=20).status_code == 200
        assert statuses(opened) == {status: 2 * PLACES}


def test_bodies_that_do_not_come_hold_places_for_seconds(flooded: Served):
    with connections(flooded, 2 * PLACES, head("/v1/chat/completions", 1000) + b"{") as opened:
        assert httpx.get(f"{flooded.url}/healthz", timeout=60).status_code == 200
        body = {"model": "base", "prompt": "hi", "max_tokens": 1}
        assert httpx.post(f"{flooded.url}/v1/completions", json=body, timeout=60).status_code == 200
        assert statuses(opened) == {408: 2 * PLACES}


def test_half_a_head_holds_nothing(flooded: Served):
    with connections(flooded, 10 * PLACES, b"GET /v1/models HTTP/1.1\r\nHost: loom\r\nX-Slow: "):
        assert httpx.get(f"{flooded.url}/v1/models", timeout=20).status_code == 200


@pytest.mark.parametrize(
    ("sent", "status"), [("sound-1", 200), ("a b", 400), ("", 400), ("x" * 200, 400), ("\xff", 400), ("é", 400)]
)
def test_an_answer_has_one_request_id_and_no_other_is_used(flooded: Served, sent: str, status: int):
    with connections(flooded, 1, head("/v1/models", 0, f"X-Request-Id: {sent}", method="GET")) as (connection,):
        got, headers = answered(connection)
    assert got == status
    if status == 200:
        assert headers["x-request-id"] == [sent]
    else:
        assert len(headers.get("x-request-id", [])) < 2


@pytest.mark.parametrize(
    "line",
    [
        "X-Session-Id: \xff", "serve_multiplexed_model_id: \xff", "X-Request-Timeout-Seconds: \xff",
        "X-Request-Disconnect-Disabled: \xff", "Authorization: \xff", "traceparent: \xff",
        "X-Request-Timeout-Seconds: 0",
    ],
)  # fmt: skip
def test_no_header_is_a_fault_of_the_proxy(flooded: Served, line: str):
    with connections(flooded, 1, head("/v1/models", 0, line, method="GET")) as (connection,):
        assert answered(connection)[0] in (200, 400)


def test_every_place_comes_back_when_streams_are_dropped_at_once(tmp_path: Path):
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.05, "max_running": 500, "max_model_len": 100_000}},
        "engines": {"max_waiting": 500, "max_ongoing_requests": 1024},
        "adapters": {"roots": [], "preload": {}},
    }
    body = json.dumps({"model": "base", "prompt": "a b", "max_tokens": 10_000, "stream": True}).encode()
    with served(tmp_path, settings) as running:
        with connections(running, NUM_STREAMS, head("/v1/completions", len(body)) + body):
            eventually(running.url, lambda found: found.total(RUNNING) == NUM_STREAMS)
        eventually(running.url, lambda found: found.total(RUNNING) == found.total(WAITING) == 0)
        answer = httpx.post(
            f"{running.url}/v1/completions", json={"model": "base", "prompt": "a", "max_tokens": 1}, timeout=30
        )
        assert answer.status_code == 200
        eventually(running.url, lambda found: found.total("loom_requests_total", status="499") == NUM_STREAMS)
