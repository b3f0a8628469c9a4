"""Liveness, readiness, metrics."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Response
from prometheus_client import CONTENT_TYPE_LATEST

from lora_runtime.errors import LoomError
from serve.engine_client import EngineUnavailable
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

    @routes.get("/metrics", summary="Prometheus text of this gateway, and sums over engine replicas")
    async def metrics() -> Response:
        try:
            engines = await asyncio.wait_for(services.engines.stats(), ENGINE_TIMEOUT_S)
        except (LoomError, TimeoutError):
            engines = []  # the gateway's own numbers are wanted most when engines are in trouble
        return Response(services.metrics.exposition(engines), media_type=CONTENT_TYPE_LATEST)

    return routes
