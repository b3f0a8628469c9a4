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
        self._begun = 0
        self._ended = 0
        self._failure: Exception | None = None

    def add(self, reload: Callable[[], None]) -> None:
        """Have ``reload``, which may block, called at the first refresh and whenever the registry changed."""
        self._reloads.append(reload)

    async def refresh(self) -> None:
        """Be as new as the registry is now. Raises what the database raises.

        However many ask at once, the database is asked twice at most: those who come while it is being read, which
        may have begun too early for them, share the next reading.
        """
        needed = self._begun + 1
        async with self._turn:
            if self._ended < needed:
                self._begun += 1
                await self._read()
                self._ended = self._begun
            if self._failure is not None:
                raise self._failure

    async def catch_up(self) -> None:
        """:meth:`refresh`, or what is known already where the database is not to be reached."""
        try:
            await self.refresh()
        except Exception as error:  # any database trouble: serve on with what is known
            log.warning("the registry cannot be read, serving what was read last: %s", type(error).__name__)

    async def _read(self) -> None:
        try:
            revision = await asyncio.to_thread(self._read_revision)
            if revision != self._revision:
                for reload in self._reloads:
                    await asyncio.to_thread(reload)
                self._revision = revision
            self._failure = None
        except Exception as error:
            self._failure = error

    async def start(self) -> None:
        """Read once, then follow."""
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        await ended(self._poller)

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            await self.catch_up()
