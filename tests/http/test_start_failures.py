"""`loom serve` that cannot start says why in a line, exits with 1 and leaves no process behind."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.served import free_port

NOWHERE = ("postgresql+psycopg://nobody", "127.0.0.1:1/none")


def start(folder: Path, settings: Mapping[str, Any], *options: str) -> tuple[int, str]:
    """Its exit status, and what it printed."""
    config = folder / "loom.yaml"
    config.write_text(yaml.safe_dump({"state_dir": str(folder / "state"), "engine": {"kind": "fake"}, **settings}))
    env = {name: value for name, value in os.environ.items() if name != "RAY_AUTH_MODE"} | {"COLUMNS": "300"}
    command = [sys.executable, "-m", "serve.cli", "serve", "--config", str(config), *options]
    ended = subprocess.run(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=250)
    return ended.returncode, ended.stdout


def test_a_port_in_use(tmp_path: Path):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, text = start(tmp_path, {"server": {"port": port}})
    assert code == 1 and "Traceback" not in text
    assert f"127.0.0.1:{port}" in text and "--port" in text


def test_a_cluster_that_is_not_there(tmp_path: Path):
    address = f"127.0.0.1:{free_port()}"
    code, text = start(tmp_path, {}, "--address", address)
    assert code == 1 and "Traceback" not in text
    assert "cannot be joined" in text and address in text and "--address" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"engine": {"kind": "fake", "options": {"no_such_option": 1}}}, ["no_such_option"]),
        ({"registry": {"url": f"{NOWHERE[0]}:sesame@{NOWHERE[1]}"}}, [f"The registry {NOWHERE[0]}:***@{NOWHERE[1]}"]),
    ],
)
def test_an_application_that_cannot_start(tmp_path: Path, settings: dict[str, Any], words: list[str]):
    code, text = start(tmp_path, {"server": {"port": free_port()}, **settings})
    assert code == 1 and "Traceback" not in text and "sesame" not in text
    assert all(word in text for word in words), text


@pytest.mark.slow
def test_ray_that_cannot_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Its folder for sessions cannot be made."""
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("RAY_TMPDIR", str(blocked))
    code, text = start(tmp_path, {"server": {"port": free_port()}})
    assert code == 1 and "Traceback" not in text
    assert "Ray could not be started here" in text and "file" in text
