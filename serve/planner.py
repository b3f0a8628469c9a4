"""Plans of merges, made where adapters and the base may be opened: in the intake, or by the command line itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import AdapterMissing, AdapterRejected, InvalidRequest, MergeRefused, VersionDamaged
from lora_runtime.merge.examples import read_examples
from lora_runtime.merge.job import JobRecipe, Plan, refused
from lora_runtime.merge.planning import Located, opened, plan_of
from lora_runtime.merge.search import split
from serve.config import Settings
from serve.damage import damage_of, damaged
from serve.intake import Named
from serve.jobs.workload import work_of
from serve.storage import copies_of

NO_BASE = "The engine here is a fake one, which has no base to merge into."


def planned(recipe: JobRecipe, named: Sequence[Named], settings: Settings, *, target: str = "") -> Plan:
    """What ``recipe`` amounts to over the versions ``named``; ``target``: a folder that the result is to be.

    Reads headers, and the adapters; blocks. Raises MergeRefused with all that is wrong, and VersionDamaged or
    StoreUnavailable where the store does not have a version as it was registered.
    """
    if settings.engine.kind == "fake":
        raise refused([NO_BASE])
    copies = copies_of(settings)
    located: list[Located] = []
    problems: list[str] = []
    lost: list[VersionDamaged] = []
    for one in named:
        try:
            folder = copies.folder_of(one.location, one.version)
        except (AdapterMissing, AdapterRejected) as error:
            lost.append(damaged(one.adapter, one.version, error.message))
            problems.append(f"'{one.adapter}': {error.message}")
            continue
        located.append(Located(adapter=one.adapter, version=one.version, location=one.location, folder=folder))
    if recipe.search is not None:
        problems += _of_examples(recipe)
    if lost and len(lost) == len(problems):  # the recipe itself has no fault
        raise lost[0]
    if problems:
        raise refused(problems)
    base = settings.engine_options["base_path"]
    try:
        found = opened(base, located, max_materialised_bytes=settings.merges.materialised_bytes)
    except MergeRefused as error:
        refs = [AdapterRef(version=one.version, path=one.location, name=one.adapter) for one in located]
        if (damage := damage_of(refs, copies)) is not None:
            raise damage from error
        raise
    plan = plan_of(recipe, located, found, base_name=settings.base.name)
    if problems := _of_place(plan, settings, target):
        raise refused(problems)
    return plan


def _of_examples(recipe: JobRecipe) -> list[str]:
    spec = recipe.search
    assert spec is not None
    try:
        split(read_examples(Path(spec.examples), metric=spec.metric), spec.held_out, spec.seed)
    except InvalidRequest as error:
        return [f"search.examples: {error.message}"]
    return []


def _of_place(plan: Plan, settings: Settings, target: str) -> list[str]:
    work = work_of(plan, settings, target=target)
    workspace = work.workspace()
    problems = []
    if (plan.recipe.product == "checkpoint" or target) and workspace.published() is not None:
        problems.append(f"'{work.site.name}' exists already; choose another name or remove it.")
    free = workspace.free_bytes()
    if free is not None and free < plan.disk_bytes:
        problems.append(
            f"The merge needs {plan.disk_bytes / 1e9:.2f} GB of disk where it is made; {free / 1e9:.2f} GB are free."
        )
    return problems
