"""``POST /v1/classify``."""

from __future__ import annotations

import asyncio
import time

from fastapi import APIRouter, Request, Response

from lora_runtime.engine.protocol import Classification, ClassifyRequest, Prompt, Usage
from lora_runtime.errors import LoomError
from serve.experiments.blame import Blame
from serve.gateway.access import Who, needs
from serve.gateway.dispatch import Dispatch
from serve.gateway.errors import CLIENT_LEFT, error_body
from serve.gateway.generation import Services, total
from serve.gateway.prompt_size import check_pieces
from serve.identity import Identity, Scope
from serve.schemas.management import ClassifyAnswer, ClassifyBody, ClassifyResult, LabelScore
from serve.tracing import traceparent

ROUTE = "classify"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["Classification"], dependencies=[needs(Scope.INFER)])

    @routes.post("/v1/classify", summary="Exact label probabilities from an adapter's classification head")
    async def classify(body: ClassifyBody, request: Request, response: Response, identity: Who) -> ClassifyAnswer:
        dispatch = await services.dispatch(body, request, identity)
        prompt = body.prompt(await services.images.fetch_all(body.urls()))
        found = await _classified(services, identity, dispatch, prompt, body.head)
        response.headers.update(dispatch.headers)
        scores = [
            LabelScore(label=label, probability=probability, logit=logit)
            for label, probability, logit in zip(found.labels, found.probabilities, found.logits, strict=True)
        ]
        best = max(scores, key=lambda score: score.probability)
        result = ClassifyResult(label=best.label, probability=best.probability, scores=scores)
        return ClassifyAnswer(
            id=f"classify-{dispatch.request_id}",
            created=int(time.time()),
            model=dispatch.target.label,
            data=[result],
            usage=total([found.usage]),
        )

    return routes


async def _classified(
    services: Services, identity: Identity, dispatch: Dispatch, prompt: Prompt, head: str | None
) -> Classification:
    """By the target, or by what the alias means where an arm cannot serve. Counts the request however it ends."""
    check_pieces(prompt)
    while True:
        target = dispatch.target
        call = ClassifyRequest(
            request_id=dispatch.request_id,
            prompt=prompt,
            adapters=target.adapters,
            head=head,
            timeout_s=services.timeout_s,
            cache_scope=services.cache_scope(identity),
            trace=traceparent(),
            caller=identity.id,
        )
        begun, status, usage = time.monotonic(), 200, Usage(prompt_tokens=0, completion_tokens=0)
        blame: Blame | None = None
        dispatch.dispatched()
        try:
            found = await services.engines.classify(call)
        except LoomError as error:
            if dispatch.falls_back(error, target):
                continue
            status, blame = error_body(error)[0], dispatch.blame(error)
            raise
        except asyncio.CancelledError:
            status, blame = CLIENT_LEFT, dispatch.blame(None)
            raise
        else:
            usage = found.usage
            services.metrics.used(target, usage, 0.0)
            if services.shadows.wants(dispatch):
                services.shadows.mirror_classification(dispatch, call, found)
            return found
        finally:
            seconds = time.monotonic() - begun
            if dispatch.target == target:
                services.metrics.answered(ROUTE, target, status, seconds)
                services.begins(dispatch, blame)
                dispatch.ended(status, seconds if status == 200 else None, 0.0, usage, blame)
