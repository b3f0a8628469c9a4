"""``/v1/adapters``: register, list, look at, delete; versions and aliases. And ``/v1/models``, the same as models."""

from __future__ import annotations

from fastapi import APIRouter, Response

from lora_runtime.errors import NotFound
from serve.gateway.generation import Services
from serve.registry.records import AdapterRecord, VersionRecord
from serve.schemas.management import (
    Adapter,
    AdapterList,
    AdapterVersion,
    AdapterVersionList,
    AliasRequest,
    Deleted,
    Model,
    ModelList,
    RegisterRequest,
)
from serve.targets import canonical, parse, resolve


def router(services: Services) -> APIRouter:
    routes = APIRouter()
    catalog = services.catalog

    def known(name: str) -> AdapterRecord:
        record = catalog.records.get(name)
        if record is None:
            raise NotFound(f"There is no adapter '{name[:128]}'.", near=[])
        return record

    @routes.get("/v1/models", tags=["OpenAI"], summary="The base and every adapter")
    async def models() -> ModelList:
        return ModelList(data=[_base(services), *(_model(services, r) for r in catalog.records.values())])

    @routes.get("/v1/models/{name:path}", tags=["OpenAI"], summary="The base, an adapter, or a combination")
    async def model(name: str) -> Model:
        target = resolve(name, None, services.base_name, catalog.registered)
        if not target.adapters:
            return _base(services)
        if len(target.adapters) == 1 and canonical(parse(name)) == target.adapters[0].name:
            return _model(services, catalog.records[target.adapters[0].name])
        return Model(id=target.label, created=services.started, parent=services.base_name)

    @routes.get("/v1/adapters", tags=["Adapters"], summary="All adapters")
    async def adapters() -> AdapterList:
        return AdapterList(data=[_adapter(record) for record in catalog.records.values()])

    @routes.post("/v1/adapters", tags=["Adapters"], status_code=201, summary="Register an adapter from a folder")
    async def register(body: RegisterRequest, response: Response) -> Adapter:
        record, is_new = await catalog.register(body.name, body.path, activate=body.activate)
        if not is_new:
            response.status_code = 200
        return _adapter(record)

    @routes.get("/v1/adapters/{name}", tags=["Adapters"], summary="One adapter")
    async def adapter(name: str) -> Adapter:
        return _adapter(known(name))

    @routes.delete("/v1/adapters/{name}", tags=["Adapters"], summary="Forget an adapter; its files stay")
    async def delete(name: str) -> Deleted:
        await catalog.remove(name)
        return Deleted(id=name)

    @routes.get("/v1/adapters/{name}/versions", tags=["Adapters"], summary="An adapter's versions, oldest first")
    async def versions(name: str) -> AdapterVersionList:
        record = known(name)
        return AdapterVersionList(data=[_version(record, version) for version in record.versions])

    @routes.get("/v1/adapters/{name}/versions/{version}", tags=["Adapters"], summary="One version, or an alias's")
    async def version(name: str, version: str) -> AdapterVersion:
        record = known(name)
        exact = catalog.registered[name].version(version)
        return _version(record, next(found for found in record.versions if found.id == exact))

    @routes.delete("/v1/adapters/{name}/versions/{version}", tags=["Adapters"], summary="Forget a version")
    async def delete_version(name: str, version: str) -> Deleted:
        exact = await catalog.remove_version(name, version)
        return Deleted(id=f"{name}@{exact}", object="adapter.version.deleted")

    @routes.put("/v1/adapters/{name}/aliases/{alias}", tags=["Adapters"], summary="Move an alias to a version")
    async def set_alias(name: str, alias: str, body: AliasRequest) -> Adapter:
        return _adapter(await catalog.set_alias(name, alias, body.version))

    @routes.delete("/v1/adapters/{name}/aliases/{alias}", tags=["Adapters"], summary="Forget an alias")
    async def delete_alias(name: str, alias: str) -> Deleted:
        await catalog.remove_alias(name, alias)
        return Deleted(id=f"{name}@{alias}", object="adapter.alias.deleted")

    return routes


def _base(services: Services) -> Model:
    return Model(id=services.base_name, created=services.started)


def _model(services: Services, record: AdapterRecord) -> Model:
    return Model(id=record.name, created=int(record.created_at.timestamp()), parent=services.base_name)


def _adapter(record: AdapterRecord) -> Adapter:
    return Adapter(
        id=record.name,
        version=record.latest.id,
        created=record.created_at,
        info=dict(record.latest.info),
        aliases=dict(record.aliases),
        num_versions=len(record.versions),
    )


def _version(record: AdapterRecord, version: VersionRecord) -> AdapterVersion:
    return AdapterVersion(
        id=version.id,
        adapter=record.name,
        number=version.number,
        created=version.created_at,
        aliases=sorted(alias for alias, named in record.aliases.items() if named == version.id),
        info=dict(version.info),
    )
