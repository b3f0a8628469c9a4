"""A merge's search for weights, on the cluster's own engines, or on one of the task's where none are served."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from ray import serve as ray_serve

from lora_runtime.engine.factory import create_engine
from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.merge.evaluating import Generate, batched, engine_evaluator
from lora_runtime.merge.examples import read_examples
from lora_runtime.merge.search import Trial, search
from serve.app import APP_NAME
from serve.engine_client import HandleClient
from serve.jobs.workload import Work

ENGINE, INTAKE = "Engine", "Intake"


async def searched(work: Work, tell: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The :class:`SearchResult`, dumped; ``tell`` hears of every new trial."""
    spec = work.plan.recipe.search
    assert spec is not None
    refs = {
        found.adapter: AdapterRef(version=found.version, path=found.location, name=found.adapter)
        for found in work.plan.inputs
    }

    async def on_trial(trial: Trial) -> None:
        tell(trial.model_dump())

    examples = read_examples(Path(spec.examples), metric=spec.metric)
    async with _engine(work) as generate:
        evaluate = engine_evaluator(generate, refs, max_tokens=spec.max_tokens, at_once=spec.at_once)
        known = [Trial.model_validate(trial) for trial in work.known]
        result = await search(spec, list(refs), examples, evaluate, on_trial, known=known)
    return result.model_dump()


@asynccontextmanager
async def _engine(work: Work) -> AsyncIterator[Generate]:
    if _is_served():
        handles = [ray_serve.get_deployment_handle(name, APP_NAME) for name in (ENGINE, INTAKE)]
        yield HandleClient(*handles).generate
        return
    settings = work.settings
    engine = create_engine(settings.engine.kind, settings.engine_options)
    await engine.start()
    try:
        yield batched(engine)
    finally:
        await engine.close()


def _is_served() -> bool:
    """Whether the cluster serves this base by Loom's application."""
    application = ray_serve.status().applications.get(APP_NAME)
    return application is not None and ENGINE in application.deployments
