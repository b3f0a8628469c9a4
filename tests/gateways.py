"""A gateway in this process, over the fake engine: the whole ASGI application, without Ray and without sockets."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import FastAPI

from lora_runtime.engine.fake import FakeConfig, FakeEngine
from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
)
from lora_runtime.merge.job import JobRecipe, Plan, refused
from serve.assembly import gateway_app
from serve.config import Settings
from serve.engine_client import Events
from serve.handover import handed_over
from serve.intake import Admitted, Named, Source
from serve.intake_replica import IntakeReplica


class LocalEngines:
    """Implements :class:`serve.engine_client.EngineClient` by one fake engine; plans no merges."""

    def __init__(self, settings: Settings) -> None:
        self._engine = FakeEngine(FakeConfig(**settings.engine.options))
        self._intake = IntakeReplica(handed_over(settings))

    async def generate(self, request: GenerateRequest) -> AsyncIterator[Events]:
        async for event in self._engine.generate(request):
            yield [event]

    async def classify(self, request: ClassifyRequest) -> Classification:
        return await self._engine.classify(request)

    async def admit(self, source: Source) -> Admitted:
        return await self._intake.admit(source)

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        raise refused(["this gateway has no base to merge into."])

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Nothing is far."""

    async def info(self) -> EngineInfo:
        return self._engine.info

    async def stats(self) -> list[EngineStats]:
        return [self._engine.stats()]


def gateway(settings: dict[str, Any]) -> FastAPI:
    """A gateway on the fake engine; ``settings`` as in the configuration file. Its lifespan starts it."""
    checked = Settings.model_validate({"base": {"name": "base"}, "engine": {"kind": "fake"}, **settings})
    return gateway_app(checked, LocalEngines(checked), lambda: None)
