"""Liveness, readiness, metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response

from serve.engine_client import EngineUnavailable
from serve.exposition import CONTENT_TYPE
from serve.follower import Follower
from serve.gateway.generation import Services

ENGINE_TIMEOUT_S = 5.0


def router(services: Services, follower: Follower) -> APIRouter:
    routes = APIRouter(tags=["Health"])

    @routes.get("/healthz", summary="This gateway is alive")
    async def healthz() -> dict[str, str]:
        return {"status": "ok"}

    @routes.get("/readyz", summary="An engine answers, and the registry is followed; 503 otherwise")
    async def readyz() -> dict[str, object]:
        follower.check_fresh()
        try:
            info = await asyncio.wait_for(services.engines.info(), ENGINE_TIMEOUT_S)
        except TimeoutError as error:
            raise EngineUnavailable("No engine answered in time.", retry_after_s=2) from error
        return {
            "status": "ready",
            "engine": info.kind,
            "adapters": len(services.catalog.records),
            "registry_age_s": round(follower.age_s, 1),
        }

    @routes.get("/metrics", summary="Prometheus text of all replicas, whichever gateway is asked")
    async def metrics() -> Response:
        return Response(await services.exported.text(), media_type=CONTENT_TYPE)

    return routes
