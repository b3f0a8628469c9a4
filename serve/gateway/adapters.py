"""``/v1/adapters``: list, register, look at, delete. And ``/v1/models``, which lists the same as models."""

from __future__ import annotations

from fastapi import APIRouter, Response

from lora_runtime.errors import NotFound
from serve.gateway.generation import Services
from serve.registry.repository import AdapterRecord
from serve.schemas.management import Adapter, AdapterList, Deleted, Model, ModelList, RegisterRequest
from serve.targets import canonical, parse, resolve


def router(services: Services) -> APIRouter:
    routes = APIRouter()
    catalog = services.catalog

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
        record, is_new = await catalog.register(body.name, body.path)
        if not is_new:
            response.status_code = 200
        return _adapter(record)

    @routes.get("/v1/adapters/{name}", tags=["Adapters"], summary="One adapter")
    async def adapter(name: str) -> Adapter:
        record = catalog.records.get(name)
        if record is None:
            raise NotFound(f"There is no adapter '{name[:128]}'.", near=[])
        return _adapter(record)

    @routes.delete("/v1/adapters/{name}", tags=["Adapters"], summary="Forget an adapter; its files stay")
    async def delete(name: str) -> Deleted:
        await catalog.remove(name)
        return Deleted(id=name)

    return routes


def _base(services: Services) -> Model:
    return Model(id=services.base_name, created=services.started)


def _model(services: Services, record: AdapterRecord) -> Model:
    return Model(id=record.name, created=int(record.created_at.timestamp()), parent=services.base_name)


def _adapter(record: AdapterRecord) -> Adapter:
    return Adapter(id=record.name, version=record.version, created=record.created_at, info=record.info)
