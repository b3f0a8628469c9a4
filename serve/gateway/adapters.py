"""``/v1/adapters``: register, list, look at, delete; versions and aliases."""

from __future__ import annotations

from contextlib import AsyncExitStack

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from serve.gateway.access import Who, needs, reaches_named
from serve.gateway.generation import Services
from serve.gateway.idempotency import has_key, idempotent, once
from serve.gateway.uploads import UPLOAD_FORM, kept, uploaded
from serve.identity import Scope
from serve.intake import Source
from serve.registry.records import AdapterRecord, VersionRecord
from serve.schemas.management import (
    Adapter,
    AdapterList,
    AdapterVersion,
    AdapterVersionList,
    AliasRequest,
    Deleted,
    RegisterRequest,
)


def router(services: Services) -> APIRouter:
    routes = APIRouter(
        tags=["Adapters"],
        dependencies=[needs(Scope.ADAPTERS), Depends(reaches_named), Depends(services.catalog.catch_up)],
        route_class=idempotent(services.replies),
    )
    catalog = services.catalog

    @routes.get("/v1/adapters", summary="All adapters")
    async def adapters(identity: Who) -> AdapterList:
        usable = (record for record in catalog.records.values() if identity.may_use(record.name))
        return AdapterList(data=[_adapter(record) for record in usable])

    @routes.post("/v1/adapters", status_code=201, summary="Register an adapter from a folder or an address")
    async def register(body: RegisterRequest, response: Response, identity: Who) -> Adapter:
        identity.check_adapter(body.name)
        source = Source(address=body.path)
        record, is_new = await catalog.register(body.name, source, activate=body.activate, actor=identity.actor)
        response.status_code = 201 if is_new else 200
        return _adapter(record)

    @routes.get("/v1/adapters/{name}", summary="One adapter")
    async def adapter(name: str) -> Adapter:
        return _adapter(catalog.adapter(name))

    @routes.delete("/v1/adapters/{name}", summary="Forget an adapter, with its versions and aliases")
    async def delete(name: str, identity: Who) -> Deleted:
        await catalog.remove(name, identity=identity)
        return Deleted(id=name)

    @routes.get("/v1/adapters/{name}/versions", summary="An adapter's versions, oldest first")
    async def versions(name: str) -> AdapterVersionList:
        record = catalog.adapter(name)
        return AdapterVersionList(data=[_version(record, version) for version in record.versions])

    # Not of the idempotent class, which reads bodies into memory: `once` asks for the digest of what is on the disk.
    uploads = APIRouter()

    @uploads.post(
        "/v1/adapters/{name}/versions",
        status_code=201,
        response_model=Adapter,
        summary="Upload an adapter's files as a version",
        openapi_extra=UPLOAD_FORM,
    )
    async def upload(name: str, request: Request, identity: Who) -> Response:
        async with AsyncExitStack() as stack:
            form = await stack.enter_async_context(uploaded(request))

            async def register() -> Response:
                async with kept(services.store, form) as receipt:
                    source = Source(receipt=receipt)
                    record, is_new = await catalog.register(name, source, activate=form.activate, actor=identity.actor)
                return JSONResponse(_adapter(record).model_dump(mode="json"), 201 if is_new else 200)

            content = await form.digest() if has_key(request) else b""
            return await once(services.replies, request, content, register, keeps=stack)

    routes.include_router(uploads)

    @routes.get("/v1/adapters/{name}/versions/{version}", summary="One version, or an alias's")
    async def version(name: str, version: str) -> AdapterVersion:
        return _version(*catalog.version(name, version))

    @routes.delete("/v1/adapters/{name}/versions/{version}", summary="Forget a version")
    async def delete_version(name: str, version: str, identity: Who) -> Deleted:
        exact = await catalog.remove_version(name, version, identity=identity)
        return Deleted(id=f"{name}@{exact}", object="adapter.version.deleted")

    @routes.put("/v1/adapters/{name}/aliases/{alias}", summary="Move an alias to a version")
    async def set_alias(name: str, alias: str, body: AliasRequest, identity: Who) -> Adapter:
        return _adapter(await catalog.set_alias(name, alias, body.version, pinned=body.pinned, actor=identity.actor))

    @routes.delete("/v1/adapters/{name}/aliases/{alias}", summary="Forget an alias")
    async def delete_alias(name: str, alias: str, identity: Who) -> Deleted:
        await catalog.remove_alias(name, alias, actor=identity.actor)
        return Deleted(id=f"{name}@{alias}", object="adapter.alias.deleted")

    return routes


def _adapter(record: AdapterRecord) -> Adapter:
    return Adapter(
        id=record.name,
        version=record.latest.id,
        created=record.created_at,
        info=dict(record.latest.info),
        aliases=dict(record.aliases),
        pinned=sorted(record.pinned),
        num_versions=len(record.versions),
    )


def _version(record: AdapterRecord, version: VersionRecord) -> AdapterVersion:
    return AdapterVersion(
        id=version.id,
        adapter=record.name,
        number=version.number,
        created=version.created_at,
        source=version.source,
        aliases=sorted(alias for alias, named in record.aliases.items() if named == version.id),
        info=dict(version.info),
    )
