"""Starting and stopping the whole service on this machine's Ray, or on a cluster it is given."""

from __future__ import annotations

import errno
import logging
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from lora_runtime.errors import LoomError
from serve.app import APP_NAME, application
from serve.config import ConfigurationError, Settings
from serve.jobs.cluster import stop_runner
from serve.ray_environment import prepare
from serve.ray_internals import listening, own_address
from serve.registry.database import Database

OBJECT_STORE_BYTES = 200 << 20
"""Ray's own default takes 30 % of memory; requests here carry a few images at most."""

PORT_WAIT_S, PORT_POLL_S = 10.0, 0.2

PROXY_GRACE_S = 5.0
"""Ray's proxy cuts off what takes too long, streams without a word; the gateway has this time to answer before."""

REACHABLE_S = 10.0
_LAST_ERROR = re.compile(r"^\s*(?:\w+\.)*[A-Z]\w+: .+", re.MULTILINE)
"""The lines that tracebacks end with."""


class StartFailed(LoomError):
    """The service cannot be started. The message says what failed and what to do."""


@contextmanager
def running(settings: Settings, *, address: str | None = None) -> Iterator[str]:
    """Deploy, wait until ready, give the base URL, take everything down again.

    ``address`` is a Ray cluster to join; without one a local Ray is started and stopped, which listens on loopback only
    and asks for a token. Raises StartFailed, ConfigurationError.
    """
    if address is None:
        _check_port(settings)
        _check_registry(settings)
    connect(address, num_cpus=max(4, os.cpu_count() or 1))
    try:
        with _translated("Ray Serve could not start the application"):
            _start_proxies(settings)
            _deploy(settings)
        try:
            yield f"{settings.server.scheme}://{settings.server.host}:{settings.server.port}"
        finally:
            _drain()
    finally:
        with suppress(RayError):
            stop_runner(settings)
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def connect(address: str | None, *, num_cpus: int) -> None:
    """Have this process be a driver of the Ray cluster at ``address``, or of a local one of so many CPUs.

    A local one listens on loopback only: :func:`serve.ray_environment.prepare` must have been called before Ray was
    imported. Raises StartFailed.
    """
    prepare(is_local=address is None)
    if address is not None:
        _check_reachable(address)
    local: dict[str, Any] = {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE_BYTES}
    what = "Ray could not be started here" if address is None else f"The Ray cluster at '{address}' cannot be joined"
    with _translated(what):
        ray.init(
            address=address or "local",  # without it, Ray would join whatever else runs on this machine
            include_dashboard=False if address is None else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
            namespace="loom",
            **({} if address else local),
        )
    if address is None and not ip_address(own_address()).is_loopback:
        ray.shutdown()
        raise StartFailed(
            "Ray was imported before its environment was prepared, and would listen on all interfaces; call "
            "serve.ray_environment.prepare first."
        )


def _deploy(settings: Settings) -> None:
    """Raises ConfigurationError, and RuntimeError with what the deployments failed of."""
    try:
        ray_serve.run(application(settings), name=APP_NAME, route_prefix="/", blocking=False)
    except RuntimeError as error:
        found = ray_serve.status().applications.get(APP_NAME)
        deployments = {} if found is None else found.deployments
        causes = [text for status in deployments.values() for text in _LAST_ERROR.findall(status.message)[-1:]]
        raise RuntimeError("\n".join([str(error), *causes])) from error


def _start_proxies(settings: Settings) -> None:
    """Raises StartFailed where Serve listens elsewhere already, since it would go on doing so."""
    wanted = HTTPOptions(
        host=settings.server.host,
        port=settings.server.port,
        request_timeout_s=settings.server.request_timeout_s + PROXY_GRACE_S,
        ssl_certfile=_text(settings.server.tls_certificate),
        ssl_keyfile=_text(settings.server.tls_key),
    )
    ray_serve.start(proxy_location=ProxyLocation.HeadOnly, http_options=wanted)
    found = listening()
    for name in ("host", "port", "ssl_certfile", "ssl_keyfile"):
        if getattr(found, name) != getattr(wanted, name):
            raise StartFailed(
                f"Ray Serve runs on this cluster already, with http_options.{name} {getattr(found, name)!r} instead of "
                f"{getattr(wanted, name)!r}. Start with the same, or end it first with `serve shutdown`."
            )


def _check_reachable(address: str) -> None:
    """Beforehand, since Ray would try for minutes. Raises StartFailed."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not port.isdecimal():  # "auto"
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=REACHABLE_S).close()
    except OSError as error:
        raise StartFailed(
            f"The Ray cluster at '{address}' cannot be joined: {error.strerror or error}. Check --address, and "
            "that the cluster runs (`ray status`)."
        ) from error


def _check_registry(settings: Settings) -> None:
    """Raises StartFailed where the registry cannot be used: its own reason, which a replica's failure to start would
    not show."""
    try:
        Database(settings.registry_url).close()
    except LoomError as error:
        raise StartFailed(f"The registry {settings.registry_name} cannot be used: {error.message}") from error


def _check_port(settings: Settings) -> None:
    """Beforehand, since Ray's proxies would try again and again. A port that another process has is waited for: the
    proxy of a service that was killed has it for some seconds. Raises StartFailed."""
    host, port = settings.server.host, settings.server.port
    deadline = time.monotonic() + PORT_WAIT_S
    while (error := _bind_error(host, port)) is not None:
        if error.errno != errno.EADDRINUSE or time.monotonic() >= deadline:
            raise StartFailed(
                f"{host}:{port} cannot be listened on: {error.strerror or error}. Choose another address with --host "
                "and --port, or stop the process that uses it."
            ) from error
        time.sleep(PORT_POLL_S)


def _bind_error(host: str, port: int) -> OSError | None:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(place)
    except OSError as error:
        return error
    return None


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Whatever Ray raises, as StartFailed with its last cause and where Ray's logs are."""
    try:
        yield
    except (StartFailed, ConfigurationError):
        raise
    except Exception as error:  # Ray raises RuntimeError, ValueError, OSError and errors of its own here
        causes = _LAST_ERROR.findall(str(error))
        cause = causes[-1].strip() if causes else f"{type(error).__name__}: {str(error).strip()}"
        raise StartFailed(f"{what}: {cause[:2000]}\nRay's logs are in /tmp/ray/session_latest/logs.") from error


def _drain() -> None:
    """Let what runs end: replicas take nothing new and wait for it, each up to its ``graceful_shutdown_timeout_s``.

    Shutting Serve down at once would take the proxies first, and with them every stream.
    """
    with suppress(RayServeException, RayError, TimeoutError):  # Serve or Ray is gone already, or does not end in time
        ray_serve.delete(APP_NAME)


def _text(path: Path | None) -> str | None:
    return None if path is None else str(path.expanduser().absolute())


def wait_for_signal() -> None:
    """Block until Ctrl-C or SIGTERM."""
    stopped = threading.Event()

    def stop(_: int, __: FrameType | None) -> None:
        stopped.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, stop)
    stopped.wait()
