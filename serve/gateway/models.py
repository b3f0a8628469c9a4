"""``/v1/models``: the base, adapters, aliases and combinations, as OpenAI lists models."""

from __future__ import annotations

from fastapi import APIRouter, Depends

from serve.experiments.records import ModelAlias
from serve.gateway.access import Who, needs
from serve.gateway.generation import Services
from serve.identity import Reachable, Scope
from serve.registry.records import AdapterRecord
from serve.schemas.management import Model, ModelList
from serve.targets import canonical, parse, resolve


def router(services: Services) -> APIRouter:
    routes = APIRouter(
        tags=["OpenAI"],
        dependencies=[needs(Scope.ADAPTERS, Scope.INFER), Depends(services.catalog.catch_up)],
    )
    catalog, assigner = services.catalog, services.assigner

    @routes.get("/v1/models", summary="The base, every alias and every adapter")
    async def models(identity: Who) -> ModelList:
        aliases = {name: alias for name, alias in assigner.aliases.items() if identity.may_use(name)}
        usable = (record for record in catalog.records.values() if identity.may_use(record.name))
        return ModelList(
            data=[
                _base(services),
                *(_alias(services, alias) for _, alias in sorted(aliases.items())),
                *(_model(services, record) for record in usable if record.name not in aliases),
            ]
        )

    @routes.get("/v1/models/{name:path}", summary="The base, an alias, an adapter, or a combination")
    async def model(name: str, identity: Who) -> Model:
        if name in assigner.aliases and identity.may_use(name):
            return _alias(services, assigner.aliases[name])
        target = resolve(name, None, services.base_name, Reachable(catalog.registered, identity))
        if not target.adapters:
            return _base(services)
        if len(target.adapters) == 1 and canonical(parse(name)) == target.adapters[0].name:
            return _model(services, catalog.records[target.adapters[0].name])
        return Model(id=target.label, created=services.started, parent=services.base_name)

    return routes


def _base(services: Services) -> Model:
    return Model(id=services.base_name, created=services.started)


def _alias(services: Services, alias: ModelAlias) -> Model:
    return Model(id=alias.name, created=int(alias.moved_at.timestamp()), parent=services.base_name)


def _model(services: Services, record: AdapterRecord) -> Model:
    return Model(id=record.name, created=int(record.created_at.timestamp()), parent=services.base_name)
