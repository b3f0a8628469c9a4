"""The metrics of the whole cluster as one Prometheus text, whichever gateway is asked.

Every replica exports through Ray, and Ray keeps the samples of a node at that node's metrics port, with the replica
among the labels and the counts of replicas that have gone. So the text is that of all nodes, put together: no
number in it belongs to the gateway that answers. Ray's prefix is taken off, so that names are Loom's and vLLM's own
(``loom_requests_total``, ``vllm:num_requests_running``); what is not of Loom's stays at the nodes' ports.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable

import httpx
import ray

from lora_runtime.errors import LoomError
from serve.gateway.together import together

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
PREFIXES = {"ray_loom_": "loom_", "ray_vllm_": "vllm:"}
"""Ray's spelling of names, and how they are shown."""
NODE_TIMEOUT_S = 5.0


class MetricsUnavailable(LoomError):
    """A node's metrics could not be read. Half of the samples would be wrong sums, so there are none."""


class ClusterMetrics:
    """Reads what all nodes export. Used from one event loop."""

    def __init__(self, addresses: Callable[[], list[str]]) -> None:
        """``addresses``: of the metrics ports of all living nodes, as "host:port"; may block."""
        self._addresses = addresses
        self._lock = asyncio.Lock()
        self._text = ""
        self._begun_at = -math.inf

    async def text(self) -> str:
        """All samples of Loom's, read after this was asked. Raises MetricsUnavailable.

        Whoever asks while the nodes are read shares the next reading, so that many are no load on the nodes. An older
        text is never given out: after one from another gateway, its counts would go back.
        """
        asked_at = time.monotonic()
        async with self._lock:
            if self._begun_at < asked_at:
                begun_at = time.monotonic()
                self._text = await self._read()
                self._begun_at = begun_at
            return self._text

    async def _read(self) -> str:
        addresses = await asyncio.to_thread(self._addresses)
        async with httpx.AsyncClient(timeout=NODE_TIMEOUT_S, trust_env=False) as client:
            texts = await together(_fetched(client, address) for address in addresses)
        return await asyncio.to_thread(merged, texts)


async def _fetched(client: httpx.AsyncClient, address: str) -> str:
    try:
        response = await client.get(f"http://{address}/metrics")
        response.raise_for_status()
    except httpx.HTTPError as error:
        raise MetricsUnavailable(
            f"The metrics port of the node at {address} does not answer ({type(error).__name__}). "
            "Check that Ray collects metrics there, and scrape the other nodes' ports meanwhile.",
            retry_after_s=5,
        ) from error
    return response.text


def merged(texts: Iterable[str]) -> str:
    """Loom's families of several Prometheus texts as one text, in which each family stands once."""
    about: dict[str, dict[str, str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        family: str | None = None
        for line in text.splitlines():
            if line.startswith(("# HELP ", "# TYPE ")):
                _, kind, name, rest = (*line.split(" ", 3), "")[:4]
                family = _shown(name)
                if family is not None:
                    about.setdefault(family, {})[kind] = f"# {kind} {family} {rest}"
            elif family is not None and (sample := _shown(line)) is not None:
                samples.setdefault(family, []).append(sample)
    lines = [line for family in sorted(samples) for line in (*about[family].values(), *samples[family])]
    return "".join(f"{line}\n" for line in lines)


def _shown(spelled: str) -> str | None:
    """A name, or a line that begins with one, without Ray's prefix; None where it is not of Loom's."""
    for prefix, short in PREFIXES.items():
        if spelled.startswith(prefix):
            return short + spelled.removeprefix(prefix)
    return None


def node_addresses() -> list[str]:
    """Of every living node of the Ray cluster that this process is connected to. Asks the cluster; blocks.

    Raises MetricsUnavailable where a node exports none.
    """
    found = []
    for node in ray.nodes():  # type: ignore[no-untyped-call]
        host, port = node["NodeManagerAddress"], node["MetricsExportPort"]
        if node["Alive"] and port <= 0:
            raise MetricsUnavailable(f"Ray collects no metrics on the node at {host}. Start it without disabling them.")
        if node["Alive"]:
            found.append(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
    return found
