"""How the gateway talks to engines: a port, and its implementation over a Ray Serve handle.

Everything that Ray may raise is translated here, at one door.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException

from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
)
from lora_runtime.errors import (
    AdapterLost,
    AdapterMissing,
    EngineFault,
    LoomError,
    MalformedAdapter,
    Overloaded,
)
from lora_runtime.merge.job import JobRecipe, Plan
from serve.intake import Admitted, Named, Source
from serve.ray_internals import by_itself

log = logging.getLogger(__name__)

PREFETCH_S = 30.0
STATS_S = 5.0
Events = list[TokenEvent]
"""Events that became available together."""


class EngineUnavailable(EngineFault):
    """No engine replica could be reached; a later try may succeed."""


class EngineClient(Protocol):
    """Engines, and the intake of adapters, as the gateway sees them. Every method raises LoomErrors only."""

    def generate(self, request: GenerateRequest) -> AsyncIterator[Events]: ...

    async def classify(self, request: ClassifyRequest) -> Classification: ...

    async def admit(self, source: Source) -> Admitted: ...

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan: ...

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Have every engine bring ``adapter`` near; what fails or takes long is left to the requests that need it."""

    async def info(self) -> EngineInfo: ...

    async def stats(self) -> list[EngineStats]:
        """Of every replica that answers."""


class HandleClient:
    """Engines and the intake behind their Ray Serve deployment handles."""

    def __init__(self, engines: Any, intake: Any) -> None:
        self._engines = engines
        self._streaming = engines.options(stream=True)
        self._intake = intake

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Events]:
        response = by_itself(lambda: self._streaming.generate.remote(request))
        is_done = False
        try:
            async for events in response:
                yield events
            is_done = True
        except (RayError, RayServeException, LoomError) as error:
            is_done = True
            raise blamed(translated(error), request.adapters) from error
        finally:
            if not is_done:
                response.cancel()

    async def classify(self, request: ClassifyRequest) -> Classification:
        try:
            return await self._call(self._engines.classify, request)
        except (AdapterMissing, MalformedAdapter) as error:
            raise blamed(error, request.adapters) from error

    async def admit(self, source: Source) -> Admitted:
        return await self._call(self._intake.admit, source)

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        return await self._call(self._intake.plan, recipe, named)

    async def prefetch(self, adapter: AdapterRef) -> None:
        try:
            await self._engines.broadcast("prefetch", adapter).results_async(
                timeout_s=PREFETCH_S, return_exceptions=True
            )
        except (RayError, RayServeException, TimeoutError) as error:
            log.warning("%s was not prefetched everywhere: %s", adapter.name, type(error).__name__)

    async def info(self) -> EngineInfo:
        return await self._call(self._engines.info)

    async def stats(self) -> list[EngineStats]:
        try:
            found = await self._engines.broadcast("stats").results_async(timeout_s=STATS_S, return_exceptions=True)
        except (RayError, RayServeException, TimeoutError) as error:
            raise translated(error) from error
        return [stats for stats in found if isinstance(stats, EngineStats)]

    async def _call(self, method: Any, *arguments: Any) -> Any:
        response = by_itself(lambda: method.remote(*arguments))
        try:
            return await response
        except asyncio.CancelledError:
            response.cancel()
            raise
        except (RayError, RayServeException, LoomError) as error:
            raise translated(error) from error


def blamed(error: LoomError, adapters: Sequence[AdapterRef]) -> LoomError:
    """What ``error`` means where ``adapters`` are registered: files that an engine does not find, or finds damaged,
    are the store's fault. Where an adapter is being registered, they are the fault of whoever named them."""
    if not isinstance(error, (AdapterMissing, MalformedAdapter)):
        return error
    named = ", ".join(f"'{ref.name}' (version {ref.version[:12]})" for ref in adapters)
    return AdapterLost(
        f"The store cannot give the files of {named}: {error.message} Register the adapter again from its source.",
        versions=[ref.version for ref in adapters],
    )


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
