"""The road of one generating request: target → engine → first events → stream or whole answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lora_runtime.engine.protocol import GenerateRequest, Prompt, Sampling, Token, TokenEvent, Usage
from lora_runtime.errors import DeadlineExceeded, EngineFault, LoomError, NotFound
from lora_runtime.store.protocol import Store
from serve.catalog import Catalog
from serve.engine_client import EngineClient, Events
from serve.gateway.access import Reachable
from serve.gateway.errors import CLIENT_LEFT, error_body
from serve.gateway.fetching import ImageFetcher
from serve.identity import Identity
from serve.registry.garbage import Garbage
from serve.registry.replies import Replies
from serve.schemas import common
from serve.targets import Target, resolve
from serve.telemetry import Metrics
from serve.tracing import traceparent

log = logging.getLogger(__name__)

SSE_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}


@dataclass(slots=True)
class Choice:
    """One choice as it grew."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    finish_reason: str | None = None


@dataclass(frozen=True, slots=True)
class Services:
    """What routes need; one per gateway process."""

    catalog: Catalog
    engines: EngineClient
    metrics: Metrics
    store: Store
    garbage: Garbage
    replies: Replies
    images: ImageFetcher
    base_name: str
    timeout_s: float
    isolates_caches: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    async def target(self, body: common.TargetedBody, identity: Identity) -> Target:
        """What the request means by its model, for one who reaches so far. Raises CallerErrors.

        A name that is not known may have been registered at another gateway just now: the registry is asked, once.
        """
        try:
            return self._resolved(body, identity)
        except NotFound:
            await self.catalog.catch_up()
            return self._resolved(body, identity)

    def _resolved(self, body: common.TargetedBody, identity: Identity) -> Target:
        return resolve(body.model, body.members(), self.base_name, Reachable(self.catalog.registered, identity))

    def cache_scope(self, identity: Identity) -> str:
        """Whose prompts an engine may find again for this one: everyone's, or the API key's own."""
        return identity.id if self.isolates_caches else ""

    async def start(
        self, route: str, request_id: str, identity: Identity, target: Target, prompt: Prompt, sampling: Sampling
    ) -> Generation:
        """Send a request and wait for its first events, so that what goes wrong until then has a status code."""
        request = GenerateRequest(
            request_id=request_id,
            prompt=prompt,
            adapters=target.adapters,
            sampling=sampling,
            timeout_s=self.timeout_s,
            cache_scope=self.cache_scope(identity),
            trace=traceparent(),
        )
        generation = Generation(self, route, target, self.engines.generate(request))
        await generation.wait_for_first()
        return generation


class Generation:
    """Events of one request, with its measurements. Iterate once; closing it cancels the request."""

    def __init__(self, services: Services, route: str, target: Target, events: AsyncIterator[Events]) -> None:
        self._services = services
        self._route = route
        self._target = target
        self._events = events
        self._first: Events = []
        self._begun = time.monotonic()
        self._first_at = self._begun
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    async def wait_for_first(self) -> None:
        """Raises whatever the engine raises before its first events."""
        try:
            async with asyncio.timeout(self._services.timeout_s):
                self._first = await anext(self._events)
        except TimeoutError as error:
            self._end(504)
            raise DeadlineExceeded("The engine gave no answer in time.", retry_after_s=1) from error
        except StopAsyncIteration as error:
            self._end(500)
            raise EngineFault("The engine ended the request without an answer.") from error
        except LoomError as error:
            self._end(error_body(error)[0])
            raise
        self._first_at = time.monotonic()
        self._services.metrics.first_token(self._target, self._first_at - self._begun)

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """All events in order. Raises LoomErrors; counts the request however it ends."""
        status = CLIENT_LEFT
        try:
            for event in self._first:
                yield self._seen(event)
            async for events in self._events:
                for event in events:
                    yield self._seen(event)
            status = 200
        except LoomError as error:
            status = error_body(error)[0]
            raise
        finally:
            closing = getattr(self._events, "aclose", None)
            if closing is not None:
                await closing()
            self._end(status)

    async def whole(self) -> dict[int, Choice]:
        """Every choice, complete."""
        choices: dict[int, Choice] = {}
        async with aclosing(self.events()) as events:
            async for event in events:
                choice = choices.setdefault(event.choice, Choice())
                choice.text += event.text
                choice.tokens += event.tokens
                choice.finish_reason = event.finish_reason or choice.finish_reason
        return dict(sorted(choices.items()))

    def _seen(self, event: TokenEvent) -> TokenEvent:
        if event.usage is not None:
            self.usage = event.usage
            self._services.metrics.used(self._target, event.usage, time.monotonic() - self._first_at)
        return event

    def _end(self, status: int) -> None:
        seconds = time.monotonic() - self._begun
        self._services.metrics.answered(self._route, self._target, status, seconds)


def total(usages: Iterable[Usage]) -> common.Usage:
    usages = list(usages)
    prompt = sum(usage.prompt_tokens for usage in usages)
    completion = sum(usage.completion_tokens for usage in usages)
    return common.Usage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def event_stream(
    generation: Generation,
    opening: Iterable[BaseModel],
    chunk: Callable[[TokenEvent], BaseModel],
    closing: Callable[[common.Usage], BaseModel] | None,
    headers: dict[str, str],
) -> StreamingResponse:
    """Server-sent events: ``opening`` chunks, one for each event, ``closing`` with the usage, ``[DONE]``.

    An error after the first byte is an event of its own with OpenAI's error body, and ends the stream.
    """

    async def lines() -> AsyncIterator[str]:
        for first in opening:
            yield _line(first)
        try:
            async with aclosing(generation.events()) as events:
                async for event in events:
                    yield _line(chunk(event))
        except LoomError as error:
            log.error("a stream broke: %s", error.message)
            yield f"event: error\ndata: {json.dumps(error_body(error)[1].model_dump())}\n\n"
            return
        if closing is not None:
            yield _line(closing(total([generation.usage])))
        yield "data: [DONE]\n\n"

    return StreamingResponse(lines(), media_type="text/event-stream", headers={**SSE_HEADERS, **headers})


def _line(model: BaseModel) -> str:
    return f"data: {model.model_dump_json()}\n\n"
