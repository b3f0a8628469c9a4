"""How the gateway talks to engines: a port, and its implementation over a Ray Serve handle.

Everything that Ray may raise is translated here, at one door.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from lora_runtime.engine.protocol import (
    AdapterInfo,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
)
from lora_runtime.errors import EngineFault, LoomError, Overloaded

Events = list[TokenEvent]
"""Events that became available together."""


class EngineUnavailable(EngineFault):
    """No engine replica could be reached; a later try may succeed."""


class EngineClient(Protocol):
    """Engines as the gateway sees them. Every method raises LoomErrors only."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Events]: ...

    async def classify(self, request: ClassifyRequest) -> Classification: ...

    async def examine(self, path: str) -> AdapterInfo: ...

    async def info(self) -> EngineInfo: ...

    async def stats(self) -> EngineStats: ...


class HandleClient:
    """Engines behind a Ray Serve deployment handle."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle
        self._streaming = handle.options(stream=True)

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Events]:
        response = self._streaming.generate.remote(request)
        is_done = False
        try:
            async for events in response:
                yield events
            is_done = True
        except (RayError, RayServeException, LoomError) as error:
            is_done = True
            raise translated(error) from error
        finally:
            if not is_done:
                response.cancel()

    async def classify(self, request: ClassifyRequest) -> Classification:
        return await self._call("classify", request)

    async def examine(self, path: str) -> AdapterInfo:
        return await self._call("examine", path)

    async def info(self) -> EngineInfo:
        return await self._call("info")

    async def stats(self) -> EngineStats:
        return await self._call("stats")

    async def _call(self, method: str, *arguments: Any) -> Any:
        try:
            return await getattr(self._handle, method).remote(*arguments)
        except (RayError, RayServeException, LoomError) as error:
            raise translated(error) from error


def translated(error: BaseException) -> LoomError:
    """The LoomError that ``error``, as it came over Ray, stands for."""
    if isinstance(error, RayTaskError):
        cause: BaseException = error.cause
        return cause if isinstance(cause, LoomError) else EngineFault(f"The engine failed: {type(cause).__name__}.")
    if isinstance(error, LoomError):
        return error
    if isinstance(error, BackPressureError):
        return Overloaded("All engines are busy and the queue is full; try again shortly.", retry_after_s=1)
    if isinstance(error, asyncio.CancelledError):
        return EngineFault("The engine dropped the request.")
    return EngineUnavailable("No engine could be reached; try again shortly.", retry_after_s=2)
