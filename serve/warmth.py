"""What a replica has ready before anyone asks: pinned aliases in slots, and what it tells routers that it holds."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Collection, Mapping
from contextlib import suppress

from lora_runtime.engine.protocol import AdapterRef, Engine
from lora_runtime.errors import LoomError
from serve.background import ended

log = logging.getLogger(__name__)

ANNOUNCE_S = 0.25
"""Between two looks at what is held: each telling goes to every router."""
RETRY_S = 5.0


class Warmth:
    """Keeps an engine's pins as the registry wants them, and routers told. Used from one event loop.

    A pin that fails (its files are gone, or there are more pins than slots) is logged and tried again; nothing else
    suffers from it.
    """

    def __init__(
        self,
        engine: Engine,
        locate: Callable[[AdapterRef], Awaitable[AdapterRef]],
        tell: Callable[[Collection[str]], None],
    ) -> None:
        """``locate`` brings an adapter's files to this machine; ``tell`` tells routers what is in slots."""
        self._engine = engine
        self._locate = locate
        self._tell = tell
        self._told: frozenset[str] = frozenset()
        self._wanted: Mapping[str, AdapterRef] = {}
        self._pinned: set[str] = set()
        self._changed = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def num_missing(self) -> int:
        """Pins that are wanted and not there yet."""
        return len(set(self._wanted) - self._pinned)

    def start(self) -> None:
        """Begin, once however often it is called; the engine has started."""
        if not self._tasks:
            self._tasks = [asyncio.create_task(self._keep_pins()), asyncio.create_task(self._announce())]

    def want(self, wanted: Mapping[str, AdapterRef]) -> None:
        """From now on these are to be pinned, and no others."""
        self._wanted = wanted
        self._changed.set()

    async def stop(self) -> None:
        for task in self._tasks:
            await ended(task)

    async def _keep_pins(self) -> None:
        while True:
            self._changed.clear()
            wanted = self._wanted
            await self._pin(wanted)
            obsolete = self._pinned - set(wanted)
            for version in obsolete:
                await self._engine.unpin(version)
                self._pinned.discard(version)
            if obsolete and self.num_missing:
                await self._pin(wanted)  # in the slots that came free
            with suppress(TimeoutError):
                await asyncio.wait_for(self._changed.wait(), RETRY_S if self.num_missing else None)

    async def _pin(self, wanted: Mapping[str, AdapterRef]) -> None:
        for version in set(wanted) - self._pinned:
            try:
                await self._engine.pin(await self._locate(wanted[version]))
            except LoomError as error:
                log.warning("%s@%s is not pinned: %s", wanted[version].name, version[:12], error.message)
            else:
                self._pinned.add(version)

    async def _announce(self) -> None:
        while True:
            held = frozenset(self._engine.stats().resident)
            if held != self._told:
                try:
                    self._tell(held)
                    self._told = held
                except Exception as error:  # routing is a hint; whatever Ray raises, requests are served
                    log.warning("routers were not told what is held: %s", type(error).__name__)
            await asyncio.sleep(ANNOUNCE_S)
