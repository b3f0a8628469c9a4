"""Following the registry: what a gateway holds in memory is read anew when the registry's revision moves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from serve.background import ended

log = logging.getLogger(__name__)

POLL_S = 0.5


class Follower:
    """Polls one number, and calls what was added when it moved. Used from one event loop; reloads run off it.

    If the database goes away, what was read last serves on.
    """

    def __init__(self, revision: Callable[[], int]) -> None:
        self._read_revision = revision
        self._reloads: list[Callable[[], None]] = []
        self._revision = -1
        self._turn = asyncio.Lock()
        self._poller: asyncio.Task[None] | None = None

    def add(self, reload: Callable[[], None]) -> None:
        """Have ``reload``, which may block, called at the first refresh and whenever the registry changed."""
        self._reloads.append(reload)

    async def refresh(self) -> None:
        """Be as new as the registry is now. Raises what the database raises."""
        async with self._turn:
            revision = await asyncio.to_thread(self._read_revision)
            if revision != self._revision:
                for reload in self._reloads:
                    await asyncio.to_thread(reload)
                self._revision = revision

    async def start(self) -> None:
        """Read once, then follow."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        await ended(self._poller)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception as error:  # any database trouble: serve on with what is known
                log.warning("the registry cannot be read, serving what was read last: %s", type(error).__name__)
