"""Adapters in host memory: read once however many requests ask, kept while there is room."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Executor
from pathlib import Path

from lora_runtime.checkpoint import fingerprint
from lora_runtime.engine.entry import AdapterReader
from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import AdapterRejected
from lora_runtime.weights import AdapterWeights


class HostCache:
    """Versions in host memory, least recently used first out beyond ``max_bytes``.

    Whoever holds a returned value keeps it alive; eviction only forgets it here. Used from one
    event loop; files are read on ``executor``.
    """

    def __init__(
        self,
        reader: AdapterReader,
        executor: Executor,
        max_bytes: int,
        on_load: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self._reader = reader
        self._executor = executor
        self._max_bytes = max_bytes
        self._on_load = on_load
        self._held: OrderedDict[str, AdapterWeights] = OrderedDict()
        self._loading: dict[str, asyncio.Task[AdapterWeights]] = {}

    @property
    def is_reading(self) -> bool:
        """Whether a file is being read. May be asked from any thread."""
        return bool(self._loading)

    async def get(self, ref: AdapterRef) -> AdapterWeights:
        """The weights of ``ref``. Raises AdapterMissing or AdapterRejected.

        Requests for one version share one read; a caller that is cancelled does not cancel it for others.
        """
        held = self._held.get(ref.version)
        if held is not None:
            self._held.move_to_end(ref.version)
            return held
        task = self._loading.get(ref.version)
        if task is None:
            task = asyncio.ensure_future(self._load(ref))
            self._loading[ref.version] = task
            task.add_done_callback(lambda done: self._finish(ref.version, done))
        return await asyncio.shield(task)

    async def _load(self, ref: AdapterRef) -> AdapterWeights:
        start = time.monotonic()
        loop = asyncio.get_running_loop()
        weights = await loop.run_in_executor(self._executor, _checked, ref, self._reader)
        self._on_load(time.monotonic() - start)
        return weights

    def _finish(self, version: str, task: asyncio.Task[AdapterWeights]) -> None:
        del self._loading[version]
        if task.cancelled() or task.exception() is not None:
            return
        self._held[version] = task.result()
        while len(self._held) > 1 and sum(w.num_bytes for w in self._held.values()) > self._max_bytes:
            self._held.popitem(last=False)


def _checked(ref: AdapterRef, reader: AdapterReader) -> AdapterWeights:
    # Copied out of the mapped file first and hashed after: a file that changes in between hashes
    # otherwise, and one that is cut short later cannot take the process down.
    weights = reader.read(ref.path).cloned()
    found = fingerprint(Path(ref.path))
    if found != ref.version:
        raise AdapterRejected(
            f"Adapter '{ref.name}' changed on disk since it was registered (registered {ref.version[:12]}, "
            f"found {found[:12]}). Register it again under a new name, or restore its files.",
            name=ref.name,
            registered=ref.version,
            found=found,
        )
    return weights
