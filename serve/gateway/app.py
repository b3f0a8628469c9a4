"""The gateway's ASGI application, from its collaborators. Knows nothing of Ray."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI

from serve.follower import Follower
from serve.gateway import adapters, chat, classify, completions, experiments, health, management, merges, models, pages
from serve.gateway.bodies import BodyMiddleware
from serve.gateway.errors import install_handlers
from serve.gateway.generation import Services
from serve.gateway.housekeeping import Housekeeping
from serve.gateway.middleware import HeadMiddleware, IdentityMiddleware, RequestIdMiddleware
from serve.gateway.observation import ObservationMiddleware
from serve.gateway.receiving import BodyLimits
from serve.identity import KeyRing
from serve.limits import KeyLimits
from serve.schemas.common import ErrorBody
from serve.tracing import Tracing
from serve.watch import Watch

DESCRIPTION = (
    "OpenAI's API over one Qwen2-VL base, many adapters, and weighted combinations of them: "
    "the model `shape:0.7+french:0.3` adds two adapters' changes to the base, weighted."
)


def create_app(
    services: Services,
    follower: Follower,
    keys: KeyRing,
    limits: KeyLimits,
    tracing: Tracing,
    watch: Watch,
    *,
    max_header_bytes: int,
    bodies: BodyLimits,
    collect_every_s: float,
    preload: Mapping[str, Path],
    behind_proxy: bool = False,
) -> FastAPI:
    """All routes over ``services``; start-up registers ``preload`` and follows the registry.

    ``behind_proxy``: Ray Serve's proxy stands in front and puts request ids on answers.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await follower.start()
        await services.catalog.preload(preload)
        housekeeping = Housekeeping(services.garbage.collect, every_s=collect_every_s)
        services.recorder.start()
        watch.start()
        await services.merging.go_on()
        yield
        await watch.stop()
        await housekeeping.stop()
        await services.shadows.stop()
        await services.recorder.stop()
        await services.images.close()
        tracing.close()
        await follower.stop()

    refused: dict[int | str, dict[str, Any]] = {
        status: {"model": ErrorBody} for status in (400, 401, 403, 404, 408, 409, 413, 429, 500, 503)
    }
    app = FastAPI(
        title="Loom", description=DESCRIPTION, version="1", lifespan=lifespan, redoc_url=None, responses=refused
    )
    for routes in (chat, completions, classify, models, adapters, experiments, merges, management, pages):
        app.include_router(routes.router(services))
    app.include_router(health.router(services, follower))
    app.include_router(experiments.feedback_router(services))
    install_handlers(app)
    app.add_middleware(BodyMiddleware, routes=app.routes, limits=bodies)
    app.add_middleware(IdentityMiddleware, keys=keys, limits=limits)
    app.add_middleware(HeadMiddleware, max_bytes=max_header_bytes)
    app.add_middleware(ObservationMiddleware, tracing=tracing)
    app.add_middleware(RequestIdMiddleware, echo=not behind_proxy)
    return app
