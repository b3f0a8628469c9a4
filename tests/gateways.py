"""A gateway in this process, over the fake engine: every route, every middleware and a real registry, without Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI

from lora_runtime.engine.factory import create_engine, create_examiner
from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    GenerateRequest,
    TokenEvent,
)
from lora_runtime.merge.job import JobRecipe, Plan, refused
from serve.assembly import gateway_app
from serve.config import Settings
from serve.identity import Scope
from serve.intake import Admitted, Intake, Named, Source
from serve.registry.database import Database
from serve.registry.keys import Keys
from serve.storage import copies_of, sources_of, store_of


class LocalEngines:
    """Implements :class:`serve.engine_client.EngineClient`: one fake engine and an intake. Plans are ``plan``."""

    def __init__(self, settings: Settings) -> None:
        self.engine = create_engine("fake", settings.engine.options)
        self.plan_made: Plan | None = None
        self.admitted: list[Source] = []
        self._intake = Intake(
            store_of(settings), sources_of(settings), copies_of(settings), create_examiner("fake", {})
        )

    async def generate(self, request: GenerateRequest) -> AsyncIterator[list[TokenEvent]]:
        async for event in self.engine.generate(request):
            yield [event]

    async def classify(self, request: ClassifyRequest) -> Classification:
        return await self.engine.classify(request)

    async def admit(self, source: Source) -> Admitted:
        self.admitted.append(source)
        return await self._intake.admit(source)

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        if self.plan_made is None:
            raise refused(["this gateway has no base to merge into."])
        return self.plan_made

    async def prefetch(self, adapter: AdapterRef) -> None:
        await self.engine.prefetch(adapter)

    async def info(self) -> EngineInfo:
        return self.engine.info


def application(settings: dict[str, Any]) -> FastAPI:
    """A gateway on the fake engine; ``settings`` as in the configuration file. Its lifespan starts it."""
    checked = Settings.model_validate({"base": {"name": "base"}, "engine": {"kind": "fake"}, **settings})
    return gateway_app(checked, LocalEngines(checked), lambda: None)


@dataclass(frozen=True)
class Gateway:
    app: Any
    engines: LocalEngines
    settings: Settings
    keys: Keys

    def client(self, *scopes: Scope, adapters: Sequence[str] | None = None) -> httpx.AsyncClient:
        """A client with a new key. Keys are known once the gateway followed the registry: see :meth:`follow`."""
        made, _ = self.keys.create("someone", scopes, adapters=adapters)
        return httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False),
            base_url="http://loom",
            headers={"Authorization": f"Bearer {made}"},
        )


@asynccontextmanager
async def gateway(folder: Path, settings: dict[str, Any]) -> AsyncIterator[Gateway]:
    checked = Settings.model_validate({"state_dir": str(folder / "state"), "base": {"name": "base"}, **settings})
    engines = LocalEngines(checked)
    app = gateway_app(checked, engines, lambda: None)
    async with app.router.lifespan_context(app):
        yield Gateway(app, engines, checked, Keys(Database(checked.registry_url)))
