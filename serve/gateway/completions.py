"""``POST /v1/completions``."""

from __future__ import annotations

import time
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lora_runtime.engine.protocol import TokenEvent
from lora_runtime.errors import InvalidRequest
from serve.gateway.access import Who, needs
from serve.gateway.generation import Generation, Services, event_stream, total
from serve.gateway.together import together
from serve.identity import Scope
from serve.schemas.common import Usage
from serve.schemas.completions import CompletionAnswer, CompletionChoice, CompletionLogprobs, CompletionRequest

ROUTE = "completions"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], dependencies=[needs(Scope.INFER)])

    @routes.post("/v1/completions", response_model=CompletionAnswer, summary="Continue a text")
    async def complete(body: CompletionRequest, request: Request, identity: Who) -> Response:
        sampling, prompts = body.sampling(), body.prompts()
        if body.stream and len(prompts) > 1:
            raise InvalidRequest("A stream takes one prompt; send several requests.", param="prompt")
        dispatch = await services.dispatch(body, request, identity, parts=len(prompts))
        request_id, model = dispatch.request_id, dispatch.target.label
        shared: dict[str, Any] = {"id": f"cmpl-{request_id}", "created": int(time.time()), "model": model}
        with_logprobs = sampling.logprobs is not None
        if body.stream:
            generation = await services.start(ROUTE, identity, dispatch, prompts[0], sampling)
            closing = _usage_chunk(shared) if body.wants_usage else None
            return event_stream(generation, (), _event_chunk(shared, with_logprobs), closing, dispatch.headers)

        async def one(number: int) -> tuple[Generation, list[CompletionChoice]]:
            part = f"-{number}"
            generation = await services.start(ROUTE, identity, dispatch, prompts[number], sampling, part=part)
            choices = [
                CompletionChoice(
                    index=number * sampling.n + index,
                    text=choice.text,
                    logprobs=CompletionLogprobs.of(choice.tokens) if with_logprobs else None,
                    finish_reason=cast(Any, choice.finish_reason),
                )
                for index, choice in (await generation.whole()).items()
            ]
            return generation, choices

        done = await together(one(number) for number in range(len(prompts)))
        choices = [choice for _, found in done for choice in found]
        answer = CompletionAnswer(**shared, choices=choices, usage=total(g.usage for g, _ in done))
        return JSONResponse(answer.model_dump(), headers=dispatch.headers)

    return routes


def _event_chunk(shared: dict[str, Any], with_logprobs: bool):  # type: ignore[no-untyped-def]
    offsets: dict[int, int] = {}

    def chunk(event: TokenEvent) -> CompletionAnswer:
        offset = offsets.get(event.choice, 0)
        offsets[event.choice] = offset + sum(len(token.text) for token in event.tokens)
        choice = CompletionChoice(
            index=event.choice,
            text=event.text,
            logprobs=CompletionLogprobs.of(list(event.tokens), offset) if with_logprobs else None,
            finish_reason=event.finish_reason,
        )
        return CompletionAnswer(**shared, choices=[choice])

    return chunk


def _usage_chunk(shared: dict[str, Any]):  # type: ignore[no-untyped-def]
    return lambda usage: CompletionAnswer(**shared, choices=[], usage=cast(Usage, usage))
