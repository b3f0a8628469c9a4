"""Copies of requests for shadow arms: after the user has the answer, when there is room, and never instead of anything.

A copy is given up wherever it would be in the way: here when enough are under way, at the engine when somebody waits.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import replace
from datetime import UTC, datetime
from typing import TypeVar

from lora_runtime.engine.protocol import (
    ChatPrompt,
    Classification,
    ClassifyRequest,
    GenerateRequest,
    ImagePart,
    Prompt,
    TextPrompt,
)
from lora_runtime.errors import LoomError
from serve.engine_client import EngineClient
from serve.experiments.assignment import uniform
from serve.experiments.blame import Blame, blame_of
from serve.experiments.events import Pair
from serve.experiments.recorder import Recorder
from serve.gateway.dispatch import Dispatch
from serve.targets import Target
from serve.telemetry import Metrics

log = logging.getLogger(__name__)

MAX_TEXT = 8192
"""Characters of a question or an answer that are kept."""

Request = TypeVar("Request", GenerateRequest, ClassifyRequest)


class Shadows:
    """Used from one event loop; :meth:`stop` gives up what is under way."""

    def __init__(self, engines: EngineClient, recorder: Recorder, metrics: Metrics, *, at_once: int) -> None:
        self._engines = engines
        self._recorder = recorder
        self._metrics = metrics
        self._at_once = at_once
        self._running: set[asyncio.Task[None]] = set()

    def wants(self, dispatch: Dispatch) -> bool:
        """Whether the answer of this request is to be compared; then give it to a ``mirror_`` method."""
        assigned = dispatch.assigned
        if assigned is None or assigned.experiment is None or not assigned.shadows or not self._at_once:
            return False
        experiment = assigned.experiment
        return uniform(f"shadow/{experiment.id}", dispatch.request_id) < experiment.plan.shadow.share

    def mirror_generation(self, dispatch: Dispatch, request: GenerateRequest, answer: str) -> None:
        self._mirror(dispatch, request, answer, self._generated)

    def mirror_classification(self, dispatch: Dispatch, request: ClassifyRequest, found: Classification) -> None:
        self._mirror(dispatch, request, _label(found), self._classified)

    async def stop(self) -> None:
        running = list(self._running)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    def _mirror(
        self, dispatch: Dispatch, request: Request, answer: str, ask: Callable[[Request], Awaitable[str]]
    ) -> None:
        assert dispatch.assigned is not None
        for arm, target in dispatch.assigned.shadows.items():
            if len(self._running) >= self._at_once:
                self._count(dispatch, arm, "dropped")
                continue
            task = asyncio.create_task(self._compare(dispatch, request, answer, ask, arm, target))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _compare(
        self,
        dispatch: Dispatch,
        request: Request,
        answer: str,
        ask: Callable[[Request], Awaitable[str]],
        arm: str,
        target: Target,
    ) -> None:
        assert dispatch.assigned is not None and dispatch.assigned.experiment is not None
        experiment = dispatch.assigned.experiment
        copy = replace(
            request, request_id=f"{request.request_id}-{arm}", adapters=target.adapters, is_spare=True, trace=""
        )
        try:
            found = await ask(copy)
        except LoomError as error:
            # Answered by another arm, so the request was one that can be answered.
            if blame_of(error, is_default=False) is not Blame.ARM:
                return self._count(dispatch, arm, "dropped")
            log.warning("a shadow arm failed: %s", type(error).__name__)
            return self._count(dispatch, arm, "failed")
        self._count(dispatch, arm, "answered")
        self._recorder.note(
            Pair(
                experiment=experiment.id,
                phase=experiment.phase.number,
                request_id=dispatch.request_id,
                served=dispatch.assigned.arm or experiment.control.name,
                shadow=arm,
                prompt=_text(request.prompt)[:MAX_TEXT] if experiment.plan.shadow.store_prompts else None,
                answer=answer[:MAX_TEXT],
                shadow_answer=found[:MAX_TEXT],
                at=datetime.now(UTC),
            )
        )

    async def _generated(self, request: GenerateRequest) -> str:
        request = replace(request, sampling=replace(request.sampling, n=1, logprobs=None))
        text = ""
        async with aclosing(self._engines.generate(request)) as batches:  # type: ignore[type-var]
            async for events in batches:
                text += "".join(event.text for event in events)
        return text

    async def _classified(self, request: ClassifyRequest) -> str:
        return _label(await self._engines.classify(request))

    def _count(self, dispatch: Dispatch, arm: str, outcome: str) -> None:
        assert dispatch.assigned is not None and dispatch.assigned.experiment is not None
        self._metrics.mirrored(dispatch.assigned.experiment.plan.name, arm, outcome)


def _label(found: Classification) -> str:
    """The likeliest."""
    return max(zip(found.probabilities, found.labels, strict=True))[1]


def _text(prompt: Prompt) -> str:
    if isinstance(prompt, TextPrompt):
        return prompt.text
    if not isinstance(prompt, ChatPrompt):
        return " ".join(map(str, prompt.token_ids))
    lines = [
        f"{message.role}: " + " ".join("<image>" if isinstance(p, ImagePart) else p.text for p in message.parts)
        for message in prompt.messages
    ]
    return "\n".join(lines)
