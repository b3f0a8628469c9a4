"""``POST /v1/classify``."""

from __future__ import annotations

import time

from fastapi import APIRouter, Request, Response

from lora_runtime.engine.protocol import ClassifyRequest
from lora_runtime.errors import LoomError
from serve.gateway.access import Who, needs
from serve.gateway.errors import error_body
from serve.gateway.generation import Services, total
from serve.identity import Scope
from serve.schemas.management import ClassifyAnswer, ClassifyBody, ClassifyResult, LabelScore
from serve.tracing import traceparent

ROUTE = "classify"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["Classification"], dependencies=[needs(Scope.INFER)])

    @routes.post("/v1/classify", summary="Exact label probabilities from an adapter's classification head")
    async def classify(body: ClassifyBody, request: Request, response: Response, identity: Who) -> ClassifyAnswer:
        target = await services.target(body, identity)
        request.state.model = target.label
        call = ClassifyRequest(
            request_id=request.state.request_id,
            prompt=body.prompt(await services.images.fetch_all(body.urls())),
            adapters=target.adapters,
            head=body.head,
            timeout_s=services.timeout_s,
            cache_scope=services.cache_scope(identity),
            trace=traceparent(),
        )
        begun, status = time.monotonic(), 200
        try:
            found = await services.engines.classify(call)
        except LoomError as error:
            status = error_body(error)[0]
            raise
        finally:
            services.metrics.answered(ROUTE, target, status, time.monotonic() - begun)
        services.metrics.used(target, found.usage, 0.0)
        response.headers["X-Model-Served"] = target.label
        scores = [
            LabelScore(label=label, probability=probability, logit=logit)
            for label, probability, logit in zip(found.labels, found.probabilities, found.logits, strict=True)
        ]
        best = max(scores, key=lambda score: score.probability)
        result = ClassifyResult(label=best.label, probability=best.probability, scores=scores)
        return ClassifyAnswer(
            id=f"classify-{call.request_id}",
            created=int(time.time()),
            model=target.label,
            data=[result],
            usage=total([found.usage]),
        )

    return routes
