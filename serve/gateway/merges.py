"""``/v1/merges`` and ``/v1/checkpoints``."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from serve.gateway.access import Who, needs
from serve.gateway.generation import Services
from serve.gateway.idempotency import idempotent
from serve.identity import Scope
from serve.registry.merges import MergeState
from serve.schemas.merges import (
    CheckpointAnswer,
    CheckpointList,
    LineAnswer,
    LogAnswer,
    MergeAnswer,
    MergeList,
    MergeRequest,
    PlanAnswer,
)

Limit = Annotated[int, Query(ge=1, le=1000)]
After = Annotated[int, Query(ge=0, lt=1 << 63)]


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["Merges"], dependencies=[needs(Scope.MERGES)], route_class=idempotent(services.replies))
    merging = services.merging

    @routes.post("/v1/merges", status_code=202, summary="Merge adapters into an adapter, or into a copy of the base")
    async def create(body: MergeRequest, identity: Who) -> MergeAnswer:
        return MergeAnswer.of(await merging.create(body.recipe(), identity))

    @routes.post("/v1/merges/plan", summary="What a merge would take, or all that is wrong with it; nothing is done")
    async def plan(body: MergeRequest, identity: Who) -> PlanAnswer:
        return PlanAnswer.of(await merging.plan(body.recipe(), identity))

    @routes.get("/v1/merges", summary="Merges, newest first, without their reports")
    async def listed(identity: Who, limit: Limit = 100, state: MergeState | None = None) -> MergeList:
        found = [MergeAnswer.of(job) for job in await merging.all(identity, limit=limit, state=state)]
        return MergeList(data=[answer.model_copy(update={"report": None, "trials": []}) for answer in found])

    @routes.get("/v1/merges/{id}", summary="One merge: its state, tasks, and report")
    async def one(id: str, identity: Who) -> MergeAnswer:
        return MergeAnswer.of(*await merging.get(id, identity))

    @routes.post("/v1/merges/{id}/cancel", summary="End a merge; nothing of it is left")
    async def cancel(id: str, identity: Who) -> MergeAnswer:
        return MergeAnswer.of(await merging.cancel(id, identity))

    @routes.get("/v1/merges/{id}/logs", summary="What happened to a merge, line by line")
    async def logs(id: str, identity: Who, after: After = 0, limit: Limit = 1000) -> LogAnswer:
        found = await merging.log(id, identity, after=after, limit=limit)
        return LogAnswer(data=[LineAnswer.of(line) for line in found])

    @routes.get("/v1/checkpoints", summary="Merged bases, by name")
    async def checkpoints(identity: Who) -> CheckpointList:
        return CheckpointList(data=[CheckpointAnswer.of(found) for found in await merging.checkpoints(identity)])

    @routes.get("/v1/checkpoints/{name}", summary="One merged base")
    async def checkpoint(name: str, identity: Who) -> CheckpointAnswer:
        return CheckpointAnswer.of(await merging.checkpoint(name, identity))

    return routes
