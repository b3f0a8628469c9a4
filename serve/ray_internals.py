"""The private names of Ray that Loom uses, all of them. ``tests/cluster`` shows that they do what they are used for."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextvars import copy_context
from dataclasses import replace
from importlib import import_module
from typing import Any, TypeVar

import ray
from ray import serve as ray_serve
from ray.serve._private.common import RequestRoutingInfo
from ray.serve._private.utils import generate_request_id
from ray.serve.config import HTTPOptions
from ray.serve.context import _get_global_client, _get_serve_request_context, _serve_request_context

from serve.ray_environment import is_loopback_only

T = TypeVar("T")


def tell_routers(versions: Collection[str]) -> None:
    """Say what this replica holds; every router knows it a fraction of a second later. Only inside a replica.

    Ray's own multiplexing says it by the same way (``ray/serve/multiplex.py``), which nothing public offers.
    """
    context = ray_serve.get_replica_context()
    info = RequestRoutingInfo(replica_id=context.replica_id, multiplexed_model_ids=list(versions))
    client = _get_global_client()
    if client is not None:
        client.record_request_routing_info(info)


def listen_as_the_node_does() -> None:
    """Have this replica's server for other replicas listen on loopback where the whole Ray does. Call it in the
    replica's constructor.

    Ray binds that server, which unpickles what it is sent, to all interfaces without asking where its node listens
    (ray 2.60, ``serve/_private/replica.py``, ``_on_initialized``). Its token is asked for there as well.
    """
    if is_loopback_only():
        replica: Any = import_module("ray.serve._private.replica")
        bind = replica.add_port_to_grpc_server

        def bind_to_loopback(server: Any, address: str) -> int:
            port: int = bind(server, address.replace("[::]:", "127.0.0.1:"))
            return port

        replica.add_port_to_grpc_server = bind_to_loopback


def own_address() -> str:
    """The address at which this process's Ray node listens."""
    address: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def listening() -> HTTPOptions:
    """Where the cluster's Ray Serve listens, whoever started it. Only after ``serve.start``."""
    client = _get_global_client()
    if client is None:
        raise RuntimeError("Ray Serve was not started")
    options: HTTPOptions = client.http_config
    return options


def by_itself(call: Callable[[], T]) -> T:
    """``call()``, which calls a deployment's handle, known to Ray by an id of its own.

    Ray gives all calls of one request the same internal id, and a router without FIFOMixin keeps one waiting call for
    each id: of two at once, one would wait for ever (ray 2.60, ``request_router.py``, ``_pending_requests_by_id``).
    """

    def called() -> T:
        context = _get_serve_request_context()
        own = replace(context, _internal_request_id=generate_request_id())
        _serve_request_context.set(own)  # type: ignore[arg-type]  # Ray declares it by its default, None
        return call()

    return copy_context().run(called)
