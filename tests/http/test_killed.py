"""Processes that are killed, clients that leave or never read, and services that share what they have."""

from __future__ import annotations

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.cluster.clusters import wait_until
from tests.fakes import write_fake_adapter
from tests.metrics import RUNNING
from tests.served import Served, free_port, served

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]

UNREAD = 8


def settings_of(folder: Path, **more: Any) -> dict[str, Any]:
    write_fake_adapter(folder / "adapters" / "french", name="french")
    return {
        "base": {"name": "base"},
        "engine": {"kind": "fake", "options": {"token_s": 0.2, "max_running": 400, "max_model_len": 100_000}},
        "adapters": {
            "roots": [str(folder / "adapters")],
            "preload": {"french": str(folder / "adapters" / "french")},
        },
        **more,
    }


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("killed")
    with served(folder, settings_of(folder, server={"request_timeout_s": 60})) as running:
        yield running


def processes(service: Served, name: str) -> list[psutil.Process]:
    """Those of the service whose command line begins with Ray's ``name`` for them."""
    found = []
    for process in service.family():
        try:
            if " ".join(process.cmdline()).startswith(f"ray::{name}"):
                found.append(process)
        except psutil.NoSuchProcess:
            continue
    return found


def kill(service: Served, name: str) -> None:
    """Kill the process, and wait until another has its place."""
    (killed,) = processes(service, name)
    killed.kill()
    wait_until(lambda: [p.pid for p in processes(service, name)] not in ([], [killed.pid]), 60)


def register(service: Served, name: str, **more: Any) -> httpx.Response:
    folder = write_fake_adapter(service.log.parent / "adapters" / name, name=name)
    body = {"name": name, "path": str(folder)}
    return httpx.post(f"{service.url}/v1/adapters", json=body, timeout=60, **more)


def ask(service: Served, model: str) -> httpx.Response:
    body = {"model": model, "prompt": "x", "max_tokens": 2}
    return httpx.post(f"{service.url}/v1/completions", json=body, timeout=60)


def answers(service: Served, model: str) -> bool:
    response = ask(service, model)
    return response.status_code == 200 and response.json()["choices"][0]["text"].split() == [f"{model}:1", "x"]


def registered(service: Served) -> set[str]:
    return {adapter["id"] for adapter in httpx.get(f"{service.url}/v1/adapters", timeout=60).json()["data"]}


def metric(service: Served, name: str, **labels: str) -> float:
    """The sum of a metric's samples that have these labels."""
    total = 0.0
    for line in httpx.get(f"{service.url}/metrics", timeout=60).text.splitlines():
        sample, _, value = line.rpartition(" ")
        if sample.startswith(name + "{") and all(f'{key}="{label}"' in sample for key, label in labels.items()):
            total += float(value)
    return total


def test_requests_and_changes_go_on_without_the_controller(service: Served):
    failed: list[int] = []
    ending = threading.Event()

    def asking() -> None:
        while not ending.is_set():
            if (status := ask(service, "french").status_code) != 200:
                failed.append(status)

    asker = threading.Thread(target=asking)
    asker.start()
    try:
        kill(service, "ServeController")
        assert register(service, "without-controller").status_code == 201
        assert not failed
    finally:
        ending.set()
        asker.join()
    kill(service, "ServeReplica:loom:Engine")  # which the new controller sees, and has another started
    wait_until(lambda: answers(service, "without-controller"), 60)


def test_a_registration_whose_intake_is_killed_happens_as_a_whole_or_not_at_all(service: Served):
    folder = write_fake_adapter(service.log.parent / "adapters" / "cut", name="cut")
    with open(folder / "adapter_model.safetensors", "r+b") as file:
        file.truncate(3 << 30)  # takes seconds to be copied
    answer: list[httpx.Response] = []
    body, key = {"name": "cut", "path": str(folder)}, {"Idempotency-Key": "cut-1"}

    def send() -> None:
        answer.append(httpx.post(f"{service.url}/v1/adapters", json=body, headers=key, timeout=120))

    sender = threading.Thread(target=send)
    sender.start()
    staging = service.log.parent / "state" / "store" / "staging"
    wait_until(lambda: any(staging.glob("*/adapter_model.safetensors")), 60)
    kill(service, "ServeReplica:loom:Intake")
    sender.join()
    assert answer[0].status_code == 503 and answer[0].headers["Retry-After"]
    assert "cut" not in registered(service)
    write_fake_adapter(folder, name="cut")  # the rest of this test needs no large one
    wait_until(lambda: httpx.post(f"{service.url}/v1/adapters", json=body, headers=key, timeout=60).is_success, 60)
    assert answers(service, "cut")


def test_clients_that_never_read_hold_their_places_until_the_deadline_at_most(service: Served):
    ended, address = metric(service, "loom_requests_total", target="base"), httpx.URL(service.url)
    body = json.dumps({"model": "base", "prompt": "w" * 200_000, "max_tokens": 150, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {len(body)}"
    sockets = []
    for _ in range(UNREAD):
        unread = socket.socket()
        unread.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        unread.connect((address.host, address.port))
        unread.sendall(head.encode() + b"\r\n\r\n" + body)
        sockets.append(unread)
    wait_until(lambda: metric(service, RUNNING) == UNREAD, 30)
    assert answers(service, "french")  # others are served meanwhile
    wait_until(lambda: metric(service, RUNNING) == 0, 90)
    wait_until(lambda: metric(service, "loom_requests_total", target="base") == ended + UNREAD, 120)
    for unread in sockets:
        unread.close()


def test_a_service_that_is_killed_starts_again_with_everything(tmp_path: Path):
    settings = settings_of(tmp_path, server={"port": free_port()})
    with served(tmp_path, settings) as first:
        assert register(first, "kept").status_code == 201
        family = first.family()
        first.process.send_signal(signal.SIGKILL)
        first.process.wait()
    with served(tmp_path, settings) as second:  # at once, where processes of the first still hold the port
        assert answers(second, "kept") and registered(second) == {"french", "kept"}
        # Ray's agents, which serve nothing, end a minute later, when they give up on reaching their cluster.
        agents = ("ray::Dashboard", "ray::RuntimeEnv")
        assert not [p for p in family if p.is_running() and not p.name().startswith(agents)]


def test_two_services_share_a_state_folder(tmp_path: Path):
    settings = settings_of(tmp_path, state_dir=str(tmp_path / "state"))
    (tmp_path / "second").mkdir()
    with served(tmp_path, settings) as first, served(tmp_path / "second", settings) as second:
        refused: list[str] = []

        def registers(service: Served, prefix: str) -> None:
            for number in range(20):
                name = f"{prefix}{number}"
                folder = write_fake_adapter(tmp_path / "adapters" / name, name=name)
                body = {"name": name, "path": str(folder)}
                response = httpx.post(f"{service.url}/v1/adapters", json=body, timeout=60)
                if response.status_code != 201:
                    refused.append(response.text)

        writers = [threading.Thread(target=registers, args=one) for one in ((first, "a"), (second, "b"), (first, "c"))]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert not refused
        assert registered(first) == registered(second) >= {f"{prefix}19" for prefix in "abc"}
        assert answers(second, "a3") and answers(first, "b3")
        httpx.delete(f"{first.url}/v1/adapters/b3").raise_for_status()
        time.sleep(2)  # the other follows within a second
        assert ask(second, "b3").status_code == 404
