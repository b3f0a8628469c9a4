"""A real `loom serve` in a process of its own, for tests that speak HTTP."""

from __future__ import annotations

import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil
import yaml

START_TIMEOUT_S = 150
METRICS_S = 1.0
"""How often replicas export what they counted."""


@dataclass(frozen=True)
class Served:
    """A running service. ``log`` holds what it printed."""

    url: str
    process: subprocess.Popen[bytes]
    log: Path

    def family(self) -> list[psutil.Process]:
        """The process and everything it started."""
        parent = psutil.Process(self.process.pid)
        return [parent, *parent.children(recursive=True)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(
    folder: Path, settings: dict[str, Any], address: str | None = None, verify: ssl.SSLContext | bool = True
) -> Iterator[Served]:
    """Start `loom serve` with ``settings`` and state in ``folder``; stop it with SIGINT, as Ctrl-C does.

    ``address``: the Ray cluster to deploy to, a new local one if None. ``verify``: whom to trust where it speaks TLS.
    """
    settings = {"state_dir": str(folder / "state"), **settings}
    settings["server"] = {"port": free_port(), **settings.get("server", {})}
    config, log = folder / "loom.yaml", folder / "serve.log"
    config.write_text(yaml.safe_dump(settings))
    with open(log, "wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "serve.cli", "serve", "--config", str(config)]
            + (["--address", address] if address else []),
            stdout=output,
            stderr=subprocess.STDOUT,
            env=_environment(address),
            start_new_session=True,
        )
    scheme = "https" if "tls_key" in settings["server"] else "http"
    running = Served(f"{scheme}://127.0.0.1:{settings['server']['port']}", process, log)
    try:
        _wait_until_ready(running, verify)
        yield running
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=90)


def _environment(address: str | None) -> dict[str, str]:
    """A local Ray is started as users start it, with its token; a test's own cluster has none."""
    inherited = {name: value for name, value in os.environ.items() if address or not name.startswith("RAY_AUTH_")}
    return {**inherited, "COLUMNS": "200", "RAY_metrics_report_interval_ms": str(round(1000 * METRICS_S))}


def _wait_until_ready(running: Served, verify: ssl.SSLContext | bool) -> None:
    deadline = time.monotonic() + START_TIMEOUT_S
    while time.monotonic() < deadline:
        if running.process.poll() is not None:
            raise RuntimeError(f"loom serve ended: {running.log.read_text()}")
        if "Ready" in running.log.read_text():
            httpx.get(f"{running.url}/readyz", timeout=30, verify=verify).raise_for_status()
            return
        time.sleep(0.2)
    raise RuntimeError(f"loom serve did not become ready: {running.log.read_text()}")
