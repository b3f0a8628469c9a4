"""The intake as a Ray Serve deployment holds it: a process of its own, since examining would slow an engine's steps."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from lora_runtime.engine.factory import create_examiner
from lora_runtime.merge.job import JobRecipe, Plan
from serve.handover import Handover, taken_over
from serve.intake import Admitted, Intake, Named, Source
from serve.logs import configure
from serve.planner import planned
from serve.ray_internals import listen_as_the_node_does
from serve.storage import copies_of, sources_of, store_of
from serve.work_telemetry import IntakeMetrics


class IntakeReplica:
    """Takes adapters in for all engines. Plain class here, Ray's coat in ``app.py``."""

    def __init__(self, settings: Handover) -> None:
        """Raises ConfigurationError."""
        listen_as_the_node_does()
        self._settings = checked = taken_over(settings)
        configure(checked.telemetry.log_level)
        examiner = create_examiner(checked.engine.kind, checked.engine_options)
        self._metrics = IntakeMetrics()
        self._intake = Intake(store_of(checked), sources_of(checked), copies_of(checked), examiner)

    async def admit(self, source: Source) -> Admitted:
        with self._metrics.admission():
            return await self._intake.admit(source)

    async def plan(self, recipe: JobRecipe, named: Sequence[Named]) -> Plan:
        return await asyncio.to_thread(planned, recipe, named, self._settings)
