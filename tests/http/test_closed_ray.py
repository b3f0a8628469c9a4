"""Ray's own ports: who reaches them runs code as the service, whatever keys its HTTP API asks for."""

from __future__ import annotations

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from serve.ray_environment import LOOPBACK_ONLY
from tests.served import Served

INTRUDER = """
import sys, ray
ray.init(address=sys.argv[1], log_to_driver=False)
@ray.remote(num_cpus=0)
def owned():
    return "code ran"
print(ray.get(owned.remote(), timeout=20))
"""


def control_store(fake: Served) -> str:
    """Where the service's Ray listens for drivers."""
    words = [word for process in fake.family() for word in process.cmdline()]
    return next(word.partition("=")[2] for word in words if word.startswith("--gcs-address="))


def intrude(address: str, **env: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    kept |= {"RAY_USAGE_STATS_ENABLED": "0", LOOPBACK_ONLY: "0", "HOME": "/nonexistent", **env}
    command = [sys.executable, "-c", INTRUDER, address]
    return subprocess.run(command, env=kept, capture_output=True, text=True, timeout=120)


def test_everything_but_http_listens_on_loopback(fake: Served):
    listening = {
        (process.name(), connection.laddr.ip)
        for process in fake.family()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert len(listening) > 3
    # IPv4 addresses in IPv6 sockets read ::ffff:127.0.0.1.
    addresses = {(name, ip_address(ip.removeprefix("::ffff:"))) for name, ip in listening}
    assert [(name, str(ip)) for name, ip in addresses if not ip.is_loopback] == []


@pytest.mark.parametrize("env", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "x" * 43}])
def test_who_has_no_token_runs_nothing(fake: Served, env: dict[str, str]):
    ended = intrude(control_store(fake), **env)
    assert ended.returncode != 0 and "code ran" not in ended.stdout
    assert "AuthenticationError" in ended.stderr


def test_the_token_is_the_services_own(fake: Served):
    """Its environment has one, and with it Ray answers: it is the token that the intruder lacked."""
    if (Path.home() / ".ray" / "auth_token").is_file():
        pytest.skip("the token of ~/.ray/auth_token is taken here")
    store = next(process for process in fake.family() if process.name() == "gcs_server")
    token = store.environ()["RAY_AUTH_TOKEN"]
    assert len(token) >= 43
    ended = intrude(control_store(fake), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=token)
    assert "code ran" in ended.stdout, ended.stderr
