"""An engine as a Ray Serve deployment holds it: plain class here, Ray's coat in ``app.py``."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, contextmanager
from dataclasses import replace
from typing import TypeVar

from opentelemetry.trace import Span, StatusCode

from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import (
    AdapterRef,
    Classification,
    ClassifyRequest,
    EngineInfo,
    EngineStats,
    GenerateRequest,
    TokenEvent,
    summed,
)
from lora_runtime.errors import DeadlineExceeded, LoomError, Overloaded, TurnTimeout
from lora_runtime.store.factory import local_path
from serve.background import ended
from serve.fairness import FairQueue
from serve.handover import Handover, taken_over
from serve.logs import REQUEST_ID, configure
from serve.pins import PinFollower
from serve.ray_internals import listen_as_the_node_does, tell_routers
from serve.storage import copies_of
from serve.tracing import Tracing
from serve.warmth import Warmth

SWITCH_S = 0.0005
MORE_INSIDE = 4
"""Beyond the engine's batch: requests whose prompts and adapters are read while others run."""

Request = TypeVar("Request", GenerateRequest, ClassifyRequest)


class EngineReplica:
    """One engine, started before the replica is ready. Errors leave as the engine's own types."""

    def __init__(self, settings: Handover) -> None:
        """Raises ConfigurationError."""
        listen_as_the_node_does()
        checked = taken_over(settings)
        # A thread that reads an adapter holds the interpreter for so long at most while a step waits for it.
        sys.setswitchinterval(SWITCH_S)
        self._engine = create_engine(checked.engine.kind, checked.engine_options)
        self._copies = copies_of(checked)
        self._max_waiting = checked.engines.max_waiting
        self._turns = FairQueue(0, 0)
        self._has_started = False
        configure(checked.telemetry.log_level)
        self._tracing = Tracing(checked.telemetry, "engine")
        self._warmth = Warmth(self._engine, self._brought, tell_routers)
        self._pins = PinFollower(checked.registry_url, self._warmth.want)

    async def generate(self, request: GenerateRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """Events in lists: what came while the last list travelled goes out together."""
        has_begun = False
        with self._traced("engine.generate", request) as span:
            async with self._turn(request, request.sampling.n, span) as (placed, given_up):
                async with aclosing(coalesced(self._engine.generate(placed))) as batches:
                    async for events in batches:
                        if given_up.is_set():
                            raise Overloaded("A spare request was given up for others.", retry_after_s=1)
                        if not has_begun:
                            span.add_event("first tokens")
                            has_begun = True
                        yield events

    async def classify(self, request: ClassifyRequest) -> Classification:
        with self._traced("engine.classify", request) as span:
            async with self._turn(request, 1, span) as (placed, _):
                return await self._engine.classify(placed)

    async def prefetch(self, adapter: AdapterRef) -> None:
        """Bring an adapter to this machine, and into host memory."""
        await self._engine.prefetch(await self._brought(adapter))

    async def info(self) -> EngineInfo:
        return self._engine.info

    async def stats(self) -> EngineStats:
        stats = self._engine.stats()
        return replace(stats, waiting=stats.waiting + self._turns.num_waiting)

    async def check_health(self) -> None:
        """Called by Ray Serve, first before a replica counts as ready; raising here gets it replaced."""
        await self._engine.start()
        if not self._has_started:
            self._has_started = True
            lanes = self._engine.info.max_batch_size
            self._turns = FairQueue(lanes + max(MORE_INSIDE, lanes // 2), self._max_waiting)
            self._warmth.start()
            self._pins.start()
        await self._engine.check_health()

    @contextmanager
    def _traced(self, name: str, request: GenerateRequest | ClassifyRequest) -> Iterator[Span]:
        """A span under the gateway's, never the current one: generators are closed from anywhere."""
        REQUEST_ID.set(request.request_id)
        span = self._tracing.start(name, request.trace, request_id=request.request_id, adapters=len(request.adapters))
        try:
            yield span
        except LoomError as error:
            span.set_status(StatusCode.ERROR, type(error).__name__)
            raise
        finally:
            span.end()

    @asynccontextmanager
    async def _turn(self, request: Request, cost: int, span: Span) -> AsyncIterator[tuple[Request, asyncio.Event]]:
        """The request as the engine takes it: files at hand, its turn come, and the time that is left; and an event
        that is set when it is to be given up, as only spare ones are.

        Raises ContextOverflow, Overloaded, TurnTimeout, DeadlineExceeded while files are fetched, and as
        ``LocalCopies.folder_of``.
        """
        given_up = asyncio.Event()
        begun = time.monotonic()
        out_of_time: type[DeadlineExceeded] = DeadlineExceeded
        async with AsyncExitStack() as stack:
            try:
                async with asyncio.timeout(request.timeout_s):
                    # First of all, so that nothing long is kept that can only be refused.
                    await self._engine.check(request.prompt)
                    # Before its turn, so that nobody waits behind a slow bucket.
                    adapters = await asyncio.gather(*(self._brought(ref) for ref in request.adapters))
                    out_of_time = TurnTimeout
                    if request.is_spare:
                        given_up = stack.enter_context(self._turns.spare(cost))
                    else:
                        await stack.enter_async_context(
                            self._turns.turn(request.caller, summed(request.adapters), cost)
                        )
                    span.add_event("turn")
            except TimeoutError as error:
                raise out_of_time("The request ran out of time waiting for its turn.", retry_after_s=1) from error
            left = None if request.timeout_s is None else request.timeout_s - (time.monotonic() - begun)
            yield replace(request, adapters=tuple(adapters), timeout_s=left), given_up

    async def _brought(self, ref: AdapterRef) -> AdapterRef:
        """The same adapter, where its files are a folder of this machine. Raises as ``LocalCopies.folder_of``."""
        if local_path(ref.path) is not None:
            return ref
        folder = await asyncio.to_thread(self._copies.folder_of, ref.path, ref.version)
        return replace(ref, path=str(folder))

    async def __del__(self) -> None:
        if not hasattr(self, "_pins"):
            return  # the constructor failed; Ray calls this all the same
        await self._pins.stop()
        await self._warmth.stop()
        await self._engine.close()
        self._tracing.close()


async def coalesced(events: AsyncIterator[TokenEvent]) -> AsyncGenerator[list[TokenEvent], None]:
    """Lists of all events available at each time; closing it closes ``events``, an error follows its events."""
    queue: asyncio.Queue[TokenEvent | BaseException | None] = asyncio.Queue()

    async def pump() -> None:
        try:
            async with aclosing(events) as opened:  # type: ignore[type-var]  # engines give async generators
                async for event in opened:
                    queue.put_nowait(event)
            queue.put_nowait(None)
        except Exception as error:  # handed to the reader, which raises it
            queue.put_nowait(error)

    task = asyncio.create_task(pump())
    try:
        while True:
            found = [await queue.get()]
            while not queue.empty():
                found.append(queue.get_nowait())
            ready = [event for event in found if isinstance(event, TokenEvent)]
            if ready:
                yield ready
            last = found[-1]
            if isinstance(last, BaseException):
                raise last
            if last is None:
                return
    finally:
        await ended(task)
