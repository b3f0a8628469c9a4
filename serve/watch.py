"""Looking at live experiments now and then: guardrails, ramps, and what the pictures are drawn from."""

from __future__ import annotations

import asyncio
import logging
import time

from lora_runtime.errors import Conflict
from serve.assigner import Assigner
from serve.background import ended
from serve.experimentation import MANAGER, Experimentation
from serve.experiments.guardrails import due
from serve.experiments.records import COLLECTING, Experiment

log = logging.getLogger(__name__)

FORGET_EVERY_S = 3600.0


class Watch:
    """Every gateway has one; the registry gives each look to one of them. Used from one event loop."""

    def __init__(self, assigner: Assigner, experiments: Experimentation, *, every_s: float) -> None:
        self._assigner = assigner
        self._experiments = experiments
        self._every_s = every_s
        self._task: asyncio.Task[None] | None = None
        self._keeping_up: asyncio.Task[None] | None = None

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())
        self._keeping_up = asyncio.create_task(self._keep_up())

    async def stop(self) -> None:
        await ended(self._task)
        await ended(self._keeping_up)

    async def look(self, experiment: Experiment) -> None:
        """Look at one experiment, if nobody else just did, and do what follows."""
        found = await self._experiments.look(experiment, 0.9 * self._every_s)
        if found is None:
            return
        for breach in (guarded for guarded in found.guardrails if guarded.is_breached):
            log.warning("experiment %s: the guardrail %s is breached", experiment.plan.name, breach.metric)
        action = due(found)
        if action is not None:
            await self._experiments.act(experiment.id, action.action, MANAGER, reason=action.reason)
        elif not found.shares.is_mismatch and not any(guarded.is_breached for guarded in found.guardrails):
            await self._experiments.step(experiment)

    async def _run(self) -> None:
        forgotten_at = time.monotonic()
        while True:
            await asyncio.sleep(self._every_s)
            if time.monotonic() - forgotten_at > FORGET_EVERY_S:
                forgotten_at = time.monotonic()
                await self._forget()
            for experiment in self._assigner.experiments:
                if experiment.state not in COLLECTING:
                    continue
                try:
                    await self.look(experiment)
                except Conflict:  # somebody acted first
                    log.info("experiment %s: was changed while it was looked at", experiment.plan.name)
                except Exception as error:  # the next look may succeed, and requests do not depend on it
                    log.warning("experiment %s: no look: %s", experiment.plan.name, type(error).__name__)

    async def _keep_up(self) -> None:
        """Beside the looks, which wait for nothing but their own experiment's sums."""
        while True:
            try:
                await self._experiments.keep_up()
            except Exception as error:  # the next time may succeed, and requests do not depend on it
                log.warning("sums of experiments were not kept up: %s", type(error).__name__)
            await asyncio.sleep(self._every_s)

    async def _forget(self) -> None:
        try:
            found = await self._experiments.forget()
        except Exception as error:  # the next time may succeed, and requests do not depend on it
            log.warning("old experiments were not forgotten: %s", type(error).__name__)
        else:
            log.info("forgot %d requests of archived experiments", found)
