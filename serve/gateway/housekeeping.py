"""What a gateway does now and then, beside its requests."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from serve.background import ended
from serve.registry.garbage import CollectionRunning

log = logging.getLogger(__name__)


class Housekeeping:
    """Calls ``collect``, which may block, every so often; every gateway does, and one of them at a time collects."""

    def __init__(self, collect: Callable[[], list[str]], *, every_s: float) -> None:
        """Begins at once, on the running loop. ``every_s`` 0: never."""
        self._collect = collect
        self._every_s = every_s
        self._task = asyncio.create_task(self._run()) if every_s else None

    async def stop(self) -> None:
        await ended(self._task)

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(self._every_s)
            try:
                removed = await asyncio.to_thread(self._collect)
            except CollectionRunning:
                log.info("another process collects the store already")
            except Exception as error:  # the next time may succeed, and requests do not depend on it
                log.warning("the store was not collected: %s", type(error).__name__)
            else:
                log.info("collected %d versions from the store", len(removed))
