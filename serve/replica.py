"""An engine as a Ray Serve deployment holds it: plain class here, Ray's coat in ``app.py``."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import (
    AdapterInfo,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
)


class EngineReplica:
    """One engine, started before the replica is ready. Errors leave as the engine's own types."""

    def __init__(self, kind: str, options: dict[str, Any]) -> None:
        self._engine = create_engine(kind, options)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Events in lists: what came while the last list travelled goes out together."""
        async with aclosing(coalesced(self._engine.generate(request))) as batches:
            async for events in batches:
                yield events

    async def classify(self, request: ClassifyRequest) -> Classification:
        return await self._engine.classify(request)

    async def examine(self, path: str) -> AdapterInfo:
        return await self._engine.examine(path)

    async def info(self) -> EngineInfo:
        return self._engine.info

    async def stats(self) -> EngineStats:
        return self._engine.stats()

    async def check_health(self) -> None:
        """Called by Ray Serve, first before a replica counts as ready; raising here gets it replaced."""
        await self._engine.start()
        await self._engine.check_health()

    async def __del__(self) -> None:
        await self._engine.close()


async def coalesced(events: AsyncIterator[TokenEvent]) -> AsyncGenerator[list[TokenEvent], None]:
    """Lists of all events available at each time; closing it closes ``events``, an error follows its events."""
    queue: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async with aclosing(events) as opened:  # type: ignore[type-var]  # engines give async generators
                async for event in opened:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:  # handed to the reader, which raises it
            queue.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        while True:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            ready = [event for event in found if isinstance(event, TokenEvent)]
            if ready:
                yield ready
            last = found[-1]
            if isinstance(last, BaseException):
                raise last
            if last is None:
                return
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task
