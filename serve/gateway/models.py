"""``/v1/models``: the base, adapters and combinations, as OpenAI lists models."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from serve.gateway.access import Reachable, Who, needs
from serve.gateway.generation import Services
from serve.identity import Scope
from serve.registry.records import AdapterRecord
from serve.schemas.management import Model, ModelList
from serve.targets import canonical, parse, resolve


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], dependencies=[needs(Scope.ADAPTERS, Scope.INFER), Depends(services.catalog.catch_up)])
    catalog = services.catalog

    @routes.get("/v1/models", summary="The base and every adapter")
    async def models(identity: Who) -> ModelList:
        usable = (record for record in catalog.records.values() if identity.may_use(record.name))
        return ModelList(data=[_base(services), *(_model(services, record) for record in usable)])

    @routes.get("/v1/models/{name:path}", summary="The base, an adapter, or a combination")
    async def model(name: str, identity: Who) -> Model:
        target = resolve(name, None, services.base_name, Reachable(catalog.registered, identity))
        if not target.adapters:
            return _base(services)
        if len(target.adapters) == 1 and canonical(parse(name)) == target.adapters[0].name:
            return _model(services, catalog.records[target.adapters[0].name])
        return Model(id=target.label, created=services.started, parent=services.base_name)

    return routes


def _base(services: Services) -> Model:
    return Model(id=services.base_name, created=services.started)


def _model(services: Services, record: AdapterRecord) -> Model:
    return Model(id=record.name, created=int(record.created_at.timestamp()), parent=services.base_name)
