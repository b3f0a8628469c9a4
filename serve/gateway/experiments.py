"""``/v1/experiments``, ``/v1/aliases`` and ``/v1/feedback``."""

from __future__ import annotations

import re
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response

from lora_runtime.errors import NotFound
from serve.experiments.phases import Action
from serve.experiments.planning import forecast
from serve.experiments.records import Experiment, Phase
from serve.gateway.access import Who, needs
from serve.gateway.generation import Services
from serve.gateway.idempotency import idempotent
from serve.identity import Scope
from serve.registry.evidence import Look
from serve.schemas.experiments import (
    ActionRequest,
    AssignmentAnswer,
    ExperimentAnswer,
    ExperimentChange,
    ExperimentList,
    FeedbackAnswer,
    FeedbackRequest,
    ForecastAnswer,
    LookAnswer,
    ModelAliasAnswer,
    ModelAliasList,
    ModelAliasRequest,
    NewExperiment,
    PairAnswer,
    PairList,
    ResultsAnswer,
)
from serve.schemas.management import AuditEntry, AuditList, Deleted

_ANSWER_ID = re.compile(r"(?:chatcmpl|cmpl|classify)-(.+)", re.DOTALL)
Limit = Annotated[int, Query(ge=1, le=1000)]
Before = Annotated[int | None, Query(ge=1, lt=1 << 63)]


def router(services: Services) -> APIRouter:
    routes = APIRouter(
        tags=["Experiments"], dependencies=[needs(Scope.EXPERIMENTS)], route_class=idempotent(services.replies)
    )
    experiments = services.experiments

    @routes.get("/v1/aliases", summary="Model names that mean a target")
    async def aliases(identity: Who) -> ModelAliasList:
        found = await experiments.aliases(identity)
        return ModelAliasList(data=[ModelAliasAnswer.of(a, services.assigner.owner(a.name)) for a in found])

    @routes.put("/v1/aliases/{name}", summary="Let a model name mean a target from now on")
    async def set_alias(name: str, body: ModelAliasRequest, identity: Who) -> ModelAliasAnswer:
        alias = await experiments.set_alias(name, body.target, identity)
        return ModelAliasAnswer.of(alias, services.assigner.owner(name))

    @routes.delete("/v1/aliases/{name}", summary="Forget a model name")
    async def delete_alias(name: str, identity: Who) -> Deleted:
        await experiments.remove_alias(name, identity)
        return Deleted(id=name, object="alias.deleted")

    @routes.get("/v1/experiments", summary="All experiments, newest first")
    async def listed(identity: Who) -> ExperimentList:
        return ExperimentList(data=[ExperimentAnswer.of(found) for found in await experiments.all(identity)])

    @routes.post("/v1/experiments", status_code=201, summary="Describe an experiment; nothing is served by it yet")
    async def create(body: NewExperiment, identity: Who) -> ExperimentAnswer:
        return ExperimentAnswer.of(await experiments.create(body, identity))

    @routes.get("/v1/experiments/{name}", summary="One experiment, by id or name")
    async def one(name: str, identity: Who) -> ExperimentAnswer:
        return ExperimentAnswer.of(await experiments.get(name, identity))

    @routes.patch("/v1/experiments/{name}", summary="Change what may change, in place or in a new phase")
    async def change(name: str, body: ExperimentChange, identity: Who) -> ExperimentAnswer:
        changed = await experiments.change(
            name, body.changes(), identity, reason=body.reason, new_phase=body.new_phase, redraw=body.redraw
        )
        return ExperimentAnswer.of(changed)

    @routes.delete("/v1/experiments/{name}", summary="Forget a draft")
    async def delete(name: str, identity: Who) -> Deleted:
        found = await experiments.remove(name, identity)
        return Deleted(id=found.id, object="experiment.deleted")

    @routes.get("/v1/experiments/{name}/results", summary="What the evidence says, now and at earlier looks")
    async def results(
        name: str, identity: Who, response: Response, phase: Annotated[int | None, Query(ge=1)] = None
    ) -> ResultsAnswer:
        experiment = await experiments.get(name, identity)
        of = None if phase is None else await _phase(services, experiment, phase)
        found = await experiments.results(experiment, of)
        looks = await experiments.looks(experiment, found.phase)
        response.headers["Cache-Control"] = "no-store"
        return ResultsAnswer(
            name=experiment.plan.name,
            alias=experiment.plan.alias,
            results=found,
            looks=[_look(look) for look in looks],
        )

    @routes.get("/v1/experiments/{name}/plan", summary="How many units, and days, it takes to see an effect")
    async def plan(
        name: str,
        identity: Who,
        effect: Annotated[float, Query(allow_inf_nan=False)],
        relative: bool = False,
        power: Annotated[float, Query(gt=0.5, lt=1)] = 0.8,
        metric: Annotated[str | None, Query(max_length=64)] = None,
    ) -> ForecastAnswer:
        experiment = await experiments.get(name, identity)
        found = forecast(
            await experiments.results(experiment),
            experiment.phase.opened_at,
            metric=metric or experiment.plan.decision_metric,
            effect=effect,
            is_relative=relative,
            power=power,
        )
        return ForecastAnswer(name=experiment.plan.name, plan=found)

    @routes.get("/v1/experiments/{name}/pairs", summary="Answers of shadow arms beside those that users got")
    async def pairs(name: str, identity: Who, limit: Limit = 50, before: Before = None) -> PairList:
        experiment = await experiments.get(name, identity)
        found = await experiments.pairs(experiment, limit=limit + 1, before=before)
        data = [
            PairAnswer(
                id=number,
                request_id=pair.request_id,
                phase=pair.phase,
                served=pair.served,
                shadow=pair.shadow,
                prompt=pair.prompt,
                answer=pair.answer,
                shadow_answer=pair.shadow_answer,
                at=pair.at,
            )
            for number, pair in found[:limit]
        ]
        return PairList(data=data, has_more=len(found) > limit)

    @routes.get("/v1/experiments/{name}/history", summary="Who did what to it and why, newest first")
    async def history(name: str, identity: Who, limit: Limit = 100, before: Before = None) -> AuditList:
        experiment = await experiments.get(name, identity)
        found = await experiments.history(experiment, limit=limit + 1, before=before)
        return AuditList(data=[AuditEntry.of(entry) for entry in found[:limit]], has_more=len(found) > limit)

    @routes.get("/v1/experiments/{name}/assignment", summary="Which arm a unit has")
    async def assignment(
        name: str, unit: Annotated[str, Query(min_length=1, max_length=512)], identity: Who
    ) -> AssignmentAnswer:
        experiment = await experiments.get(name, identity)
        return AssignmentAnswer(phase=experiment.phase.number, unit=unit, arm=experiments.assignment(experiment, unit))

    @routes.post("/v1/experiments/{name}/{action}", summary="Move an experiment on in its life")
    async def act(name: str, action: Action, body: ActionRequest, identity: Who) -> ExperimentAnswer:
        moved = await experiments.act(
            name,
            action,
            identity,
            reason=body.reason,
            arm=body.arm,
            despite_mismatch=body.despite_mismatch,
        )
        return ExperimentAnswer.of(moved)

    return routes


def feedback_router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["Experiments"], dependencies=[needs(Scope.EXPERIMENTS, Scope.INFER)])

    @routes.post("/v1/feedback", summary="Report what came of a request")
    async def feedback(body: FeedbackRequest, identity: Who) -> FeedbackAnswer:
        match = _ANSWER_ID.fullmatch(body.request_id)
        request_id = match[1] if match else body.request_id
        may_any = bool({Scope.EXPERIMENTS, Scope.ADMIN} & identity.scopes)
        noted = await services.experiments.feedback(
            request_id,
            body.metric,
            body.value,
            key=body.idempotency_key,
            identity=identity,
            may_any=may_any,
        )
        return FeedbackAnswer(
            request_id=request_id, metric=body.metric, counts=noted.counts, repeated=noted.is_repeated
        )

    return routes


async def _phase(services: Services, experiment: Experiment, number: int) -> Phase:
    for phase in await services.experiments.phases(experiment):
        if phase.number == number:
            return phase
    raise NotFound(f"The experiment has no phase {number}.", param="phase", near=[])


def _look(look: Look) -> LookAnswer:
    effects: dict[str, dict[str, Any]] = {}
    for compared in look.results["comparisons"]:
        if compared["effect"] is not None:
            row = (compared["low"], compared["effect"], compared["high"])
            effects.setdefault(compared["metric"], {})[compared["arm"]] = row
    return LookAnswer(as_of=look.at, units={arm["arm"]: arm["units"] for arm in look.results["arms"]}, effects=effects)
