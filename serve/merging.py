"""Merges as the gateway offers them: planned by the intake, put into the registry, done by the owner of the tasks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from lora_runtime.errors import InvalidRequest, LoomError, NotFound
from lora_runtime.merge.job import JobRecipe, Plan, refused
from lora_runtime.store.sources import listed
from serve.catalog import Catalog
from serve.engine_client import EngineClient
from serve.identity import Identity, Reachable
from serve.intake import Named
from serve.registry.garbage import Garbage
from serve.registry.merges import Checkpoint, MergeJob, MergeLine, Merges, MergeState, MergeUnit
from serve.targets import Registered, parse, target_of

HOLD_S = 600.0
"""Until the job's owner takes over, who holds its inputs in the store as long as it needs them."""

log = logging.getLogger(__name__)


class Merging:
    """Used from one event loop. ``ensure``: has the cluster's owner of merge tasks up; it may block."""

    def __init__(
        self,
        merges: Merges,
        catalog: Catalog,
        engines: EngineClient,
        garbage: Garbage,
        ensure: Callable[[], None],
        *,
        base_name: str,
        roots: Sequence[Path],
    ) -> None:
        self._merges = merges
        self._catalog = catalog
        self._engines = engines
        self._garbage = garbage
        self._ensure = ensure
        self._base_name = base_name
        self._roots = [root.expanduser().resolve() for root in roots]

    async def go_on(self) -> None:
        """Have jobs worked on that an earlier life of the service left."""
        if await asyncio.to_thread(self._merges.num_open):
            await self._ensured()

    async def plan(self, recipe: JobRecipe, identity: Identity) -> Plan:
        """What ``recipe`` amounts to. Raises MergeRefused with everything that is wrong, or Forbidden."""
        identity.check_adapter(recipe.name)
        if recipe.search is not None:
            recipe = self._confined(recipe)
        await self._catalog.catch_up()
        named = located(recipe, self._base_name, Reachable(self._catalog.registered, identity))
        if recipe.product == "adapter":
            self._catalog.check_name(recipe.name)
        return await self._engines.plan(recipe, named)

    async def create(self, recipe: JobRecipe, identity: Identity) -> MergeJob:
        """Plan it, and have it done. Raises as :meth:`plan`, and Conflict where its name is being made already."""
        plan = await self.plan(recipe, identity)
        content = plan.model_dump(mode="json")
        job = await asyncio.to_thread(self._merges.create, recipe.name, content, plan.id, actor=identity.actor)
        for version in plan.versions.values():
            await asyncio.to_thread(self._garbage.hold, version, job.holder, HOLD_S)
        await self._ensured()
        return job

    async def get(self, identifier: str, identity: Identity) -> tuple[MergeJob, list[MergeUnit]]:
        """A job and its units. Raises NotFound, also for one whose result the key does not reach."""
        job, units = await asyncio.to_thread(self._merges.progress, identifier)
        if not identity.may_use(job.name):
            raise NotFound(f"There is no merge '{identifier[:64]}'.", near=[])
        return job, units

    async def all(self, identity: Identity, *, limit: int, state: MergeState | None) -> list[MergeJob]:
        found = await asyncio.to_thread(self._merges.all, limit=limit, state=state)
        return [job for job in found if identity.may_use(job.name)]

    async def cancel(self, identifier: str, identity: Identity) -> MergeJob:
        """Raises NotFound."""
        job, _ = await self.get(identifier, identity)
        return await asyncio.to_thread(self._merges.cancel, job.id, actor=identity.actor)

    async def log(self, identifier: str, identity: Identity, *, after: int, limit: int) -> list[MergeLine]:
        """Raises NotFound."""
        job, _ = await self.get(identifier, identity)
        return await asyncio.to_thread(self._merges.log, job.id, after=after, limit=limit)

    async def checkpoints(self, identity: Identity) -> list[Checkpoint]:
        found = await asyncio.to_thread(self._merges.checkpoints)
        return [checkpoint for checkpoint in found if identity.may_use(checkpoint.name)]

    async def checkpoint(self, name: str, identity: Identity) -> Checkpoint:
        """Raises NotFound, or Forbidden."""
        identity.check_adapter(name)
        return await asyncio.to_thread(self._merges.checkpoint, name)

    async def _ensured(self) -> None:
        try:
            await asyncio.to_thread(self._ensure)
        except Exception as error:  # the job is in the registry; whoever is up next has it done
            log.error("the owner of merge tasks is not up: %s", type(error).__name__, exc_info=error)

    def _confined(self, recipe: JobRecipe) -> JobRecipe:
        """``recipe`` with its examples' path resolved. Raises InvalidRequest for one outside of the allowed folders."""
        spec = recipe.search
        assert spec is not None
        try:
            path = Path(spec.examples).resolve()
        except (OSError, RuntimeError, ValueError) as error:
            raise InvalidRequest("The path of the examples cannot be resolved.", param="search.examples") from error
        if not any(path.is_relative_to(root) for root in self._roots):
            raise InvalidRequest(
                "The path of the examples is outside the folders that they may be read from (setting merges.roots): "
                f"{listed(self._roots)}.",
                param="search.examples",
            )
        return recipe.model_copy(update={"search": spec.model_copy(update={"examples": str(path)})})


def located(recipe: JobRecipe, base_name: str, registered: Mapping[str, Registered]) -> list[Named]:
    """The versions that a recipe's inputs mean now. Raises MergeRefused with all that mean nothing."""
    found, problems = [], []
    for said in recipe.inputs:
        try:
            members = parse(said.adapter)
            if len(members) != 1 or members[0].weight != 1.0:
                raise InvalidRequest(f"'{said.adapter[:128]}' is not one adapter; give its weight as 'weight'.")
            (ref,) = target_of(members, said.adapter, base_name, registered).adapters
        except LoomError as error:
            problems.append(error.message)
            continue
        found.append(Named(adapter=said.adapter, version=ref.version, location=ref.path))
    if problems:
        raise refused(problems)
    return found
