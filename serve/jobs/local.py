"""A merge without a service: planned here, carried out by a Ray cluster's own jobs actor, watched in the registry.

A local cluster ends with this process. What was done stays recorded: the same recipe again goes on from there.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import ray

from lora_runtime.errors import Conflict, LoomError
from lora_runtime.folder import fingerprint
from lora_runtime.merge.job import JobRecipe, Plan, refused
from serve.catalog import registered_of
from serve.config import Settings
from serve.intake import Named
from serve.jobs.cluster import ensure_runner, stop_runner
from serve.launch import connect
from serve.merging import located
from serve.planner import planned
from serve.registry.database import Database
from serve.registry.merges import MergeJob, Merges, MergeUnit
from serve.registry.repository import Repository

POLL_S = 0.5
ACTOR = "command line"


def plan_here(recipe: JobRecipe, settings: Settings, target: Path | None) -> Plan:
    """Inputs are folders, or adapters of the registry. Raises MergeRefused."""
    database = Database(settings.registry_url)
    adapters = Repository(database).adapters()
    database.close()
    registered = {name: registered_of(record) for name, record in adapters.items()}
    folders, problems = [], []
    for said in recipe.inputs:
        path = Path(said.adapter).expanduser()
        if not path.is_dir():
            continue
        try:
            version = fingerprint(path)
        except LoomError as error:
            problems.append(f"'{said.adapter}': {error.message}")
            continue
        folders.append(Named(adapter=said.adapter, version=version, location=str(path.absolute())))
    if problems:
        raise refused(problems)
    known = {one.adapter for one in folders}
    rest = tuple(said for said in recipe.inputs if said.adapter not in known)
    named = located(recipe.model_copy(update={"inputs": rest}), settings.base.name, registered) if rest else []
    return planned(recipe, [*folders, *named], settings, target=_spelled(target))


@contextmanager
def merging_here(
    plan: Plan, settings: Settings, target: Path | None, *, address: str | None
) -> Iterator[Iterator[tuple[MergeJob, list[MergeUnit]]]]:
    """The job as it goes on, until it has ended: a new one, or one of the same plan that was cut off.

    Raises Conflict where another merge of that name is under way.
    """
    database = Database(settings.registry_url)
    merges = Merges(database)
    job = merges.under_way(plan.recipe.name, _spelled(target))
    if job is not None and job.plan_id != plan.id:
        raise Conflict(f"Another merge into '{plan.recipe.name}' was begun, {job.id}; cancel it or let it end.")
    if job is None:
        content = plan.model_dump(mode="json")
        job = merges.create(plan.recipe.name, content, plan.id, actor=ACTOR, target=_spelled(target))
    connect(address, num_cpus=os.cpu_count() or 1)
    try:
        ensure_runner(settings)
        yield _watched(merges, job)
    finally:
        # A cluster that stays goes on with what has not ended.
        if address is None or not merges.num_open():
            stop_runner(settings)
        ray.shutdown()
        database.close()


def _watched(merges: Merges, job: MergeJob) -> Iterator[tuple[MergeJob, list[MergeUnit]]]:
    while job.ended_at is None:
        time.sleep(POLL_S)
        job, units = merges.progress(job.id)
        yield job, units


def _spelled(target: Path | None) -> str:
    return "" if target is None else str(target.expanduser().absolute())
