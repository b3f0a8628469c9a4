"""Ctrl-C leaves nothing behind."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.served import served


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_no_process_outlives_the_service(tmp_path: Path, how: signal.Signals):
    settings = {"engine": {"kind": "fake"}, "adapters": {"roots": [], "preload": {}}}
    with served(tmp_path, settings) as running:
        assert httpx.get(f"{running.url}/healthz").status_code == 200
        family = running.family()
        assert len(family) > 3
        running.process.send_signal(how)
        running.process.wait(timeout=60)
        assert running.process.returncode == 0
        deadline = time.monotonic() + 15
        while any(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in family):
            assert time.monotonic() < deadline, [p for p in family if p.is_running()]
            time.sleep(0.2)


def test_a_stream_that_runs_is_finished_before_the_service_ends(tmp_path: Path):
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.03}},
        "adapters": {"roots": [], "preload": {}},
    }
    with served(tmp_path, settings) as running:
        body = {"model": "base", "prompt": "a b c", "max_tokens": 150, "stream": True}
        with httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as response:
            lines = response.iter_lines()
            next(lines)
            running.process.send_signal(signal.SIGTERM)
            received = [line for line in lines if line]
        assert received[-1] == "data: [DONE]" and len(received) > 140
        running.process.wait(timeout=60)


def test_a_configuration_that_cannot_be_used_ends_with_one_clear_message(tmp_path: Path):
    with pytest.raises(RuntimeError, match=r"engine\.kind"), served(tmp_path, {"engine": {"kind": "magic"}}):
        raise AssertionError("it started")
