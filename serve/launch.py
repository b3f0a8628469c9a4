"""Starting and stopping the whole service on this machine's Ray, or on a cluster it is given."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import ray
from ray import serve as ray_serve
from ray.exceptions import RayError
from ray.serve.config import HTTPOptions, ProxyLocation
from ray.serve.exceptions import RayServeException

from serve.app import APP_NAME, application
from serve.config import Settings
from serve.jobs.cluster import stop_runner
from serve.proxy import CALLBACK

OBJECT_STORE_BYTES = 200 << 20
"""Ray's own default takes 30 % of memory; requests here carry a few images at most."""

MESSAGE_BYTES = 256 << 20


@contextmanager
def running(settings: Settings, *, address: str | None = None) -> Iterator[str]:
    """Deploy, wait until ready, give the base URL, take everything down again.

    ``address`` is a Ray cluster to join; without one a local Ray is started and stopped.
    """
    connect(address, num_cpus=max(4, os.cpu_count() or 1))
    try:
        ray_serve.start(
            proxy_location=ProxyLocation.HeadOnly,
            http_options=HTTPOptions(
                host=settings.server.host,
                port=settings.server.port,
                request_timeout_s=settings.server.request_timeout_s,
                ssl_certfile=_text(settings.server.tls_certificate),
                ssl_keyfile=_text(settings.server.tls_key),
            ),
        )
        ray_serve.run(application(settings), name=APP_NAME, route_prefix="/", blocking=False)
        yield f"{settings.server.scheme}://{settings.server.host}:{settings.server.port}"
    finally:
        _drain()
        with suppress(RayError):
            stop_runner(settings)
        ray_serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def connect(address: str | None, *, num_cpus: int) -> None:
    """Have this process be a driver of the Ray cluster at ``address``, or of a local one of so many CPUs."""
    _prepare_environment()
    local: dict[str, Any] = {"num_cpus": num_cpus, "object_store_memory": OBJECT_STORE_BYTES}
    ray.init(
        address=address or "local",  # without it, Ray would join whatever else runs on this machine
        include_dashboard=False if address is None else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
        namespace="loom",
        **({} if address else local),
    )


def _drain() -> None:
    """Let what runs end: replicas take nothing new and wait for it, each up to its ``graceful_shutdown_timeout_s``.

    Shutting Serve down at once would take the proxies first, and with them every stream.
    """
    with suppress(RayServeException, RayError):  # Serve or Ray is gone already, or the application never came
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


def _prepare_environment() -> None:
    """What Ray and transformers read from the environment, for this process and the ones it starts."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # On a busy machine a proxy takes longer to start than Ray's default of 5 s allows.
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")
    os.environ.setdefault(*CALLBACK)
    # Requests carry images; Ray's default of 4 MB for messages between replicas is too small for them.
    os.environ.setdefault("RAY_SERVE_REPLICA_GRPC_MAX_MESSAGE_LENGTH", str(MESSAGE_BYTES))
