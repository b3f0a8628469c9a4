"""What is found out before Ray is started: whether the port can be listened on."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from serve import launch
from serve.config import ServerSettings, Settings
from serve.launch import StartFailed


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as found:
        yield found


def settings_of(host: str, port: int) -> Settings:
    return Settings(server=ServerSettings(host=host, port=port))


def test_a_port_that_a_killed_service_gives_up_in_time_is_waited_for(listener: socket.socket):
    closing = threading.Timer(0.5, listener.close)
    closing.start()
    launch._check_port(settings_of("127.0.0.1", listener.getsockname()[1]))
    closing.join()


def test_a_port_that_stays_taken_ends_the_start(listener: socket.socket, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch, "PORT_WAIT_S", 0.3)
    port = listener.getsockname()[1]
    with pytest.raises(StartFailed, match=rf"127\.0\.0\.1:{port}.*--port"):
        launch._check_port(settings_of("127.0.0.1", port))


def test_an_address_of_another_machine_ends_the_start_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(launch.time, "sleep", pytest.fail)
    with pytest.raises(StartFailed, match=r"198\.51\.100\.1:8000"):
        launch._check_port(settings_of("198.51.100.1", 8000))


def test_connections_that_are_still_closing_are_no_obstacle(listener: socket.socket):
    address = listener.getsockname()
    with socket.create_connection(address) as client:
        accepted, _ = listener.accept()
        accepted.close()  # the side that closes first keeps the port in TIME_WAIT
        assert client.recv(1) == b""
    listener.close()
    launch._check_port(settings_of(*address))
