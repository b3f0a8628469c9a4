"""Adapters read beside the step: files, hashes and what PEFT merges take long, and no step waits for them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

from lora_runtime.engine import threads
from lora_runtime.engine.vllm.fusion import LeafParts
from lora_runtime.weights import Head

GRACE_S = 0.003
"""How long a step waits for an adapter that is nearly read: small ones need not be asked for twice."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Staged:
    """An adapter cut to vLLM's leaves, by their names there, in host memory of its own."""

    parts: Mapping[str, LeafParts]
    heads: Mapping[str, Head]

    @property
    def num_saved(self) -> int:
        """Elements saved in full."""
        return sum(part.num_saved for part in self.parts.values())


Prepare = Callable[[str, str], Staged]
"""(path, version) → what goes into a slot. Called on a thread; raises a LoomError."""


class Staging:
    """One thread that prepares adapters, and what it has prepared. Used from the worker's own thread."""

    def __init__(self, prepare: Prepare) -> None:
        self._prepare = prepare
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loom-stage", initializer=threads.compute_alone)
        self._pending: dict[str, Future[Staged]] = {}

    @property
    def is_busy(self) -> bool:
        """Whether an adapter is being read."""
        return any(not future.done() for future in self._pending.values())

    def take(self, path: str, version: str) -> Staged | None:
        """The adapter, handed out once; None while it is being read: ask again. Raises what preparing it raised."""
        future = self._pending.get(version)
        if future is None:
            future = self._pending[version] = self._thread.submit(self._prepare, path, version)
        wait([future], GRACE_S)
        if not future.done():
            return None
        del self._pending[version]
        return future.result()

    def drop(self, version: str) -> None:
        """Forget an adapter that nobody will take; nothing happens where it is not prepared."""
        if (future := self._pending.pop(version, None)) is not None:
            future.cancel()
