"""A request that runs out of time is told so by the gateway, not cut off by Ray's proxy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from tests.served import Served, served

pytestmark = pytest.mark.slow

DEADLINE_S, TOKEN_S = 3.0, 0.7
"""The engine looks at the time between tokens, so some time after the deadline."""


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": TOKEN_S}},
        "adapters": {"roots": [], "preload": {}},
        "server": {"request_timeout_s": DEADLINE_S},
    }
    with served(tmp_path_factory.mktemp("deadline"), settings) as running:
        yield running


def body(**more: Any) -> dict[str, Any]:
    return {"model": "base", "prompt": "a b c", "max_tokens": 50, **more}


def test_a_whole_answer(service: Served):
    response = httpx.post(f"{service.url}/v1/completions", json=body(), timeout=60)
    assert response.status_code == 504
    assert response.json()["error"]["type"] == "timeout_error" and response.headers["Retry-After"]


def test_a_stream(service: Served):
    with httpx.stream("POST", f"{service.url}/v1/completions", json=body(stream=True), timeout=60) as response:
        assert response.status_code == 200
        lines = [line for line in response.iter_lines() if line]
    assert lines[-2] == "event: error"
    assert json.loads(lines[-1].removeprefix("data: "))["error"]["type"] == "timeout_error"
