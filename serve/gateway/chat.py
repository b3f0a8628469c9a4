"""``POST /v1/chat/completions``."""

from __future__ import annotations

import time
from typing import Any, cast

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from lora_runtime.engine.protocol import TokenEvent
from serve.gateway.access import Who, needs
from serve.gateway.generation import Services, event_stream, total
from serve.identity import Scope
from serve.schemas.chat import (
    AnswerMessage,
    ChatAnswer,
    ChatChoice,
    ChatChunk,
    ChatRequest,
    ChoiceLogprobs,
    ChunkChoice,
    Delta,
)
from serve.schemas.common import Usage

ROUTE = "chat"


def router(services: Services) -> APIRouter:
    routes = APIRouter(tags=["OpenAI"], dependencies=[needs(Scope.INFER)])

    @routes.post("/v1/chat/completions", response_model=ChatAnswer, summary="Answer a conversation, with images")
    async def chat(body: ChatRequest, request: Request, identity: Who) -> Response:
        dispatch = await services.dispatch(body, request, identity)
        sampling = body.sampling()
        prompt = body.prompt(await services.images.fetch_all(body.urls(), identity.id or dispatch.request_id))
        generation = await services.start(ROUTE, identity, dispatch, prompt, sampling)
        headers, model = dispatch.headers, dispatch.target.label
        shared: dict[str, Any] = {"id": f"chatcmpl-{dispatch.request_id}", "created": int(time.time()), "model": model}
        with_logprobs = sampling.logprobs is not None
        if body.stream:
            chunks = _Chunks(shared, with_logprobs)
            closing = chunks.usage if body.wants_usage else None
            return event_stream(generation, chunks.opening(sampling.n), chunks.event, closing, headers)
        choices = [
            ChatChoice(
                index=index,
                message=AnswerMessage(content=choice.text),
                logprobs=ChoiceLogprobs.of(choice.tokens) if with_logprobs else None,
                finish_reason=cast(Any, choice.finish_reason),
            )
            for index, choice in (await generation.whole()).items()
        ]
        answer = ChatAnswer(**shared, choices=choices, usage=total([generation.usage]))
        return JSONResponse(answer.model_dump(), headers=headers)

    return routes


class _Chunks:
    """A stream's chunks, sharing id, time and model."""

    def __init__(self, shared: dict[str, Any], with_logprobs: bool) -> None:
        self._shared = shared
        self._with_logprobs = with_logprobs

    def opening(self, count: int) -> list[ChatChunk]:
        delta = Delta(role="assistant", content="")
        return [ChatChunk(**self._shared, choices=[ChunkChoice(index=i, delta=delta)]) for i in range(count)]

    def event(self, event: TokenEvent) -> ChatChunk:
        choice = ChunkChoice(
            index=event.choice,
            delta=Delta(content=event.text),
            logprobs=ChoiceLogprobs.of(list(event.tokens)) if self._with_logprobs else None,
            finish_reason=event.finish_reason,
        )
        return ChatChunk(**self._shared, choices=[choice])

    def usage(self, usage: Usage) -> ChatChunk:
        return ChatChunk(**self._shared, choices=[], usage=usage)
