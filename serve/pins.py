"""Which versions are pinned, as a replica learns it from the registry."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping

from lora_runtime.engine.protocol import AdapterRef
from serve.background import ended
from serve.follower import Follower
from serve.registry.database import Database
from serve.registry.records import AdapterRecord
from serve.registry.repository import Repository

log = logging.getLogger(__name__)

CONNECT_RETRY_S = 5.0

Pins = Mapping[str, AdapterRef]


def pinned(records: Collection[AdapterRecord]) -> Pins:
    """By version, what pinned aliases mean."""
    found = {}
    for record in records:
        paths = {version.id: version.path for version in record.versions}
        for alias in record.pinned:
            version = record.aliases[alias]
            found[version] = AdapterRef(version=version, path=paths[version], name=record.name)
    return found


class PinFollower:
    """Calls ``on_change`` with all pins, on the event loop, at first and whenever they may have changed.

    A registry that cannot be reached is waited for: a replica serves without it.
    """

    def __init__(self, url: str, on_change: Callable[[Pins], None]) -> None:
        self._url = url
        self._on_change = on_change
        self._task: asyncio.Task[None] | None = None
        self._follower: Follower | None = None

    def start(self) -> None:
        """Begin, once however often it is called."""
        if self._task is None:
            self._task = asyncio.create_task(self._follow())

    async def stop(self) -> None:
        await ended(self._task)
        if self._follower is not None:
            await self._follower.stop()

    async def _follow(self) -> None:
        while self._follower is None:
            try:
                self._follower = await self._connected()
            except Exception as error:  # whatever the database's driver raises
                log.warning("the registry cannot be reached for its pins: %s", type(error).__name__)
                await asyncio.sleep(CONNECT_RETRY_S)

    async def _connected(self) -> Follower:
        loop = asyncio.get_running_loop()
        database = await asyncio.to_thread(Database, self._url)
        repository = Repository(database)

        known: dict[str, AdapterRecord] = {}

        def reload() -> None:
            nonlocal known
            known = repository.adapters(known)
            loop.call_soon_threadsafe(self._on_change, pinned(known.values()))

        follower = Follower(repository.revision, snapshot=database.reading)
        follower.add(reload)
        try:
            await follower.start()
        except BaseException:
            await follower.stop()
            database.close()
            raise
        return follower
