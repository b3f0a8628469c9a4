"""Operation: the audit, and the store's collection. And vLLM's own routes for adapters, for tools made for vLLM."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import PlainTextResponse

from lora_runtime.errors import InvalidRequest, NotFound
from serve.gateway.access import Who, needs
from serve.gateway.generation import Services
from serve.identity import Identity, Scope
from serve.intake import Source
from serve.schemas.management import AuditEntry, AuditList, Collected, LoadLoraRequest, UnloadLoraRequest


def router(services: Services) -> APIRouter:
    routes = APIRouter()
    catalog = services.catalog

    @routes.get(
        "/v1/audit", tags=["Operation"], summary="Who changed what, newest first", dependencies=[needs(Scope.ADMIN)]
    )
    async def audit(
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        before: Annotated[int | None, Query(ge=1, lt=1 << 63)] = None,
    ) -> AuditList:
        found = await catalog.audit(limit=limit + 1, before=before)
        return AuditList(data=[AuditEntry.of(entry) for entry in found[:limit]], has_more=len(found) > limit)

    @routes.post(
        "/v1/store/collect",
        tags=["Operation"],
        summary="Take away what nobody names any more",
        dependencies=[needs(Scope.ADMIN)],
    )
    async def collect() -> Collected:
        return Collected(versions=await asyncio.to_thread(services.garbage.collect))

    @routes.post("/v1/load_lora_adapter", tags=["vLLM"], summary="Register an adapter, as vLLM loads one")
    async def load(body: LoadLoraRequest, identity: Who) -> PlainTextResponse:
        _check(identity, body.lora_name)
        if body.lora_name in catalog.records and not body.load_inplace:
            raise InvalidRequest(
                f"The lora adapter '{body.lora_name}' has already been loaded. If you want to load the adapter in "
                "place, set 'load_inplace' to True.",
                param="lora_name",
            )
        await catalog.register(body.lora_name, Source(address=body.lora_path), actor=identity.actor)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    @routes.post("/v1/unload_lora_adapter", tags=["vLLM"], summary="Forget an adapter, as vLLM unloads one")
    async def unload(body: UnloadLoraRequest, identity: Who) -> PlainTextResponse:
        _check(identity, body.lora_name)
        if body.lora_name not in catalog.records:
            raise NotFound(f"The lora adapter '{body.lora_name}' cannot be found.", near=[])
        await catalog.remove(body.lora_name, identity=identity)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    return routes


def _check(identity: Identity, name: str) -> None:
    identity.check(Scope.ADAPTERS)
    identity.check_adapter(name)
