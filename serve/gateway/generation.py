"""The road of one generating request: target → engine → first events → stream or whole answer."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable
from contextlib import aclosing
from dataclasses import dataclass, field

from fastapi import Request
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lora_runtime.engine.protocol import GenerateRequest, Prompt, Sampling, Token, TokenEvent, Usage
from lora_runtime.errors import DeadlineExceeded, EngineFault, LoomError, NotFound
from lora_runtime.store.protocol import Store
from serve.assigner import Assigner
from serve.catalog import Catalog
from serve.engine_client import EngineClient, Events
from serve.experimentation import Experimentation
from serve.experiments.blame import Blame
from serve.experiments.recorder import Recorder
from serve.gateway.dispatch import Dispatch, forced_variant, subject_of
from serve.gateway.errors import CLIENT_LEFT, error_body
from serve.gateway.fetching import ImageFetcher
from serve.gateway.prompt_size import check_pieces
from serve.gateway.shadowing import Shadows
from serve.identity import Identity, Reachable
from serve.merging import Merging
from serve.registry.garbage import Garbage
from serve.registry.replies import Replies
from serve.schemas import common
from serve.targets import resolve
from serve.telemetry import Metrics
from serve.tracing import traceparent

log = logging.getLogger(__name__)

ENGINE_GRACE_S = 5.0
"""How much longer an engine is waited for than it may take: only what has died says nothing."""
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
    assigner: Assigner
    experiments: Experimentation
    recorder: Recorder
    shadows: Shadows
    merging: Merging
    base_name: str
    timeout_s: float
    isolates_caches: bool = False
    started: int = field(default_factory=lambda: int(time.time()))

    async def dispatch(
        self, body: common.TargetedBody, request: Request, identity: Identity, *, parts: int = 1
    ) -> Dispatch:
        """What the request means by its model, for one who reaches so far: a target, or an alias, whose experiment
        gives it an arm. Raises CallerErrors.

        A name that is not known may have been registered at another gateway just now: the registry is asked, once.
        """
        try:
            found = self._dispatched(body, request, identity)
        except NotFound:
            await self.catalog.catch_up()
            found = self._dispatched(body, request, identity)
        found.parts = parts
        request.state.model, request.state.dispatch = found.target.label, found
        return found

    def _dispatched(self, body: common.TargetedBody, request: Request, identity: Identity) -> Dispatch:
        request_id, name = request.state.request_id, (body.model or "").strip()
        if body.adapters is None and name in self.assigner.aliases and identity.may_use(name):
            subject = subject_of(body, request, identity)
            assigned = self.assigner.assign(name, subject, forced=forced_variant(request, identity))
            if assigned is not None:
                return Dispatch(request_id, identity.id, assigned.target, assigned, self.recorder)
        reachable = Reachable(self.catalog.registered, identity)
        return Dispatch(request_id, identity.id, resolve(body.model, body.members(), self.base_name, reachable))

    def cache_scope(self, identity: Identity) -> str:
        """Whose prompts an engine may find again for this one: everyone's, or the API key's own."""
        return identity.id if self.isolates_caches else ""

    async def start(
        self, route: str, identity: Identity, dispatch: Dispatch, prompt: Prompt, sampling: Sampling, *, part: str = ""
    ) -> Generation:
        """Send a request and wait for its first events, so that what goes wrong until then has a status code, and an
        arm that cannot serve is left for what the alias means."""
        check_pieces(prompt)
        while True:
            target = dispatch.target
            request = GenerateRequest(
                request_id=dispatch.request_id + part,
                prompt=prompt,
                adapters=target.adapters,
                sampling=sampling,
                timeout_s=self.timeout_s,
                cache_scope=self.cache_scope(identity),
                trace=traceparent(),
                caller=identity.id,
            )
            dispatch.dispatched()
            generation = Generation(self, route, dispatch, request)
            try:
                await generation.wait_for_first()
            except LoomError as error:
                if dispatch.falls_back(error, target):
                    continue
                blame = dispatch.blame(error)
                self.begins(dispatch, blame)
                generation.end(error_body(error)[0], blame)
                raise
            self.begins(dispatch)
            return generation

    def begins(self, dispatch: Dispatch, blame: Blame | None = None) -> None:
        """The answer begins, or it is known that there will be none, by whose fault ``blame`` says."""
        if dispatch.answering(blame) and dispatch.variant is not None:
            self.metrics.assigned(*dispatch.variant)


class Generation:
    """Events of one request, with its measurements. Iterate once; closing it cancels the request."""

    def __init__(self, services: Services, route: str, dispatch: Dispatch, request: GenerateRequest) -> None:
        self._services = services
        self._route = route
        self._dispatch = dispatch
        self._target = dispatch.target
        self._request = request
        self._events: AsyncIterator[Events] = services.engines.generate(request)
        self._first: Events = []
        self._begun = time.monotonic()
        self._first_at: float | None = None
        self._last_at = self._begun
        self._mirrored: list[str] | None = [] if dispatch.parts == 1 and services.shadows.wants(dispatch) else None
        self.usage = Usage(prompt_tokens=0, completion_tokens=0)

    async def wait_for_first(self) -> None:
        """Raises whatever the engine raises before its first events; the caller says then how it ended."""
        try:
            # The engine has the same time, and says what it went by.
            async with asyncio.timeout(self._services.timeout_s + ENGINE_GRACE_S):
                self._first = await anext(self._events)
        except TimeoutError as error:
            raise DeadlineExceeded("The engine gave no answer in time.", retry_after_s=1) from error
        except StopAsyncIteration as error:
            raise EngineFault("The engine ended the request without an answer.") from error
        except asyncio.CancelledError:
            self.end(CLIENT_LEFT, self._dispatch.blame(None))
            raise
        self._first_at = self._last_at = time.monotonic()
        self._services.metrics.first_token(self._target, self._first_at - self._begun)

    async def events(self) -> AsyncGenerator[TokenEvent, None]:
        """All events in order. Raises LoomErrors; counts the request however it ends."""
        status: int = CLIENT_LEFT
        blame: Blame | None = self._dispatch.blame(None)
        try:
            for event in self._first:
                yield self._seen(event)
            async for events in self._events:
                for event in events:
                    yield self._seen(event)
            status, blame = 200, None
        except LoomError as error:
            status = error_body(error)[0]
            blame = self._dispatch.blame(error, never_ends=self._request.sampling.ignore_eos)
            raise
        finally:
            closing = getattr(self._events, "aclose", None)
            if closing is not None:
                await closing()
            self.end(status, blame)

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
        if self._mirrored is not None and event.choice == 0:
            self._mirrored.append(event.text)
        if event.usage is not None:
            self._last_at = time.monotonic()
            self.usage = event.usage
            self._services.metrics.used(self._target, event.usage, self._decoding_s)
        return event

    @property
    def _decoding_s(self) -> float:
        return 0.0 if self._first_at is None else self._last_at - self._first_at

    def end(self, status: int, blame: Blame | None) -> None:
        """Count the request as ended so; ``blame``: whose fault it is that it failed, None where it was answered."""
        self._services.metrics.answered(self._route, self._target, status, time.monotonic() - self._begun)
        first_s = None if self._first_at is None else self._first_at - self._begun
        self._dispatch.ended(status, first_s, self._decoding_s, self.usage, blame)
        if status == 200 and self._mirrored is not None:
            self._services.shadows.mirror_generation(self._dispatch, self._request, "".join(self._mirrored))


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
