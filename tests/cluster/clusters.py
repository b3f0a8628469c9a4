"""Real Ray clusters of several nodes on this machine, and what is asked of them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import psutil
import ray
from ray import serve as ray_serve
from ray.cluster_utils import Cluster
from ray.serve.context import _set_global_client

NODE = {"num_cpus": 2, "object_store_memory": 100 << 20}


@contextmanager
def cluster_of(num_nodes: int, *, head_cpus: int = 1) -> Iterator[Cluster]:
    """A head, and nodes beside it; this process is connected as a driver."""
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "30")  # as ``launch.py`` has it
    head = {"num_cpus": head_cpus, "object_store_memory": 100 << 20, "include_dashboard": False}
    started = Cluster(initialize_head=True, head_node_args=head)
    for _ in range(num_nodes):
        started.add_node(**NODE)
    started.wait_for_nodes()
    ray.init(address=started.address, namespace="loom", log_to_driver=False)
    yield started
    _set_global_client(None)  # Serve would go on asking this cluster's controller
    ray.shutdown()
    started.shutdown()


def replica_processes(cluster: Cluster, deployment: str) -> list[psutil.Process]:
    found = []
    for node in cluster.list_all_nodes():
        for raylet in node.all_processes["raylet"]:
            for process in psutil.Process(raylet.process.pid).children(recursive=True):
                with suppress(psutil.Error):  # it has just died
                    if " ".join(process.cmdline()).startswith(f"ray::ServeReplica:loom:{deployment}"):
                        found.append(process)
    return found


def num_running(deployment: str) -> int:
    states = ray_serve.status().applications["loom"].deployments[deployment].replica_states
    return states.get("RUNNING", 0)


def wait_until(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
