"""Merge jobs from a recipe to what is published, as ``loom merge`` has them done, with the tasks in this process."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import AutoModelForImageTextToText

from lora_runtime.merge.job import JobRecipe, Plan
from serve.config import Settings
from serve.jobs.cluster import Call, Progress, _perform
from serve.jobs.local import ACTOR, plan_here
from serve.jobs.runner import Runner
from serve.loading import load_settings
from serve.registry.database import Database
from serve.registry.merges import MergeJob, Merges


class TasksHere:
    """Runs calls one after the other, as a Ray of one process would."""

    def largest_memory(self) -> float:
        return float("inf")

    @contextmanager
    def started(self, work: Any, calls: Sequence[Call]) -> Iterator[Iterator[Progress]]:
        yield self._progress(work, calls)

    def _progress(self, work: Any, calls: Sequence[Call]) -> Iterator[Progress]:
        for call in calls:
            for value in _perform(work, call.step, call.unit):
                yield Progress(call=call, value=value)
            yield Progress(call=call, is_done=True)


def settings_of(state: Path, base: Path) -> Settings:
    return load_settings(
        {"state_dir": str(state), "base": {"name": "tiny", "path": str(base)}, "engine": {"kind": "embedded"}}
    )


def planned(settings: Settings, recipe: dict[str, Any], out: Path) -> Plan:
    return plan_here(JobRecipe.model_validate({"name": out.name, **recipe}), settings, out)


def made(settings: Settings, recipe: dict[str, Any], out: Path) -> MergeJob:
    """The job once it has ended: its result lies at ``out``, or it says why not."""
    plan = planned(settings, recipe, out)
    database = Database(settings.registry_url)
    merges = Merges(database)
    created = merges.create(plan.recipe.name, plan.model_dump(mode="json"), plan.id, actor=ACTOR, target=str(out))
    job = merges.claim("here", 600.0)
    assert job is not None and job.id == created.id
    Runner(settings, TasksHere())._run(job)  # type: ignore[arg-type]
    ended = merges.get(job.id)
    database.close()
    return ended


def deltas_of(base: Path, adapter: Path) -> dict[str, Tensor]:
    """ΔW of each leaf by PEFT's own reading of the folder, in fp64."""
    model = AutoModelForImageTextToText.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = PeftModel.from_pretrained(model, str(adapter)).double()
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach()
        for name, module in adapted.named_modules()
        if hasattr(module, "get_delta_weight")
    }
