"""What tasks of a merge are given, and what is known of their records. Imports no torch: the tasks' owner uses it."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from lora_runtime.merge.job import Plan, Unit
from lora_runtime.merge.workspace import Site, Workspace
from serve.config import Settings
from serve.handover import Handover, handed_over, taken_over

ASSEMBLY, PROBE = "assembly", "probe"
"""Records of what is done once for a job."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Work:
    """A plan, where its result is made, and the service's settings. ``known``: a search's trials so far."""

    plan: Plan
    site: Site
    handover: Handover
    known: tuple[Mapping[str, Any], ...] = ()

    @property
    def settings(self) -> Settings:
        """Raises ConfigurationError where this process lacks a secret."""
        return _taken_over(self.handover)

    def workspace(self) -> Workspace:
        options = self.settings.merges.options.get_secret_value()
        return replace(self.site, options=options).open()

    def unit(self, name: str) -> Unit:
        return next(unit for unit in self.plan.units if unit.name == name)

    @property
    def stamp(self) -> str:
        """Of the base's shards as they are now: whether one was written since then."""
        stamps = []
        for unit in self.plan.units if self.plan.recipe.product == "checkpoint" else ():
            found = os.stat(Path(self.plan.base.path) / unit.file)
            stamps.append(f"{unit.file} {found.st_size} {found.st_mtime_ns}")
        return ";".join(stamps)

    def is_done(self, record: Mapping[str, Any] | None) -> bool:
        """Whether ``record`` is of this plan, and its sources are what they were."""
        return record is not None and record.get("plan") == self.plan.id and record.get("base") == self.stamp


def work_of(plan: Plan, settings: Settings, *, target: str = "") -> Work:
    """``target``: a folder that the result is to be, instead of an entry of the registry."""
    place = Path(target) if target else None
    name = plan.recipe.name if place is None else place.name
    site = Site(
        root=settings.merges_url if place is None else str(place.parent),
        name=name,
        id=hashlib.sha256(f"{plan.id} {name}".encode()).hexdigest()[:32],
        scratch=str(settings.copies_folder / "merges"),
    )
    return Work(plan=plan, site=site, handover=handed_over(settings))


def check_of(unit: str) -> str:
    """The record of a unit's check."""
    return f"check-{unit}"


@lru_cache(maxsize=4)
def _taken_over(handover: Handover) -> Settings:
    return taken_over(handover)
