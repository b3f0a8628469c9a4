"""What the registry gives out: plain values, detached from any session."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_runtime.errors import LoomError

SHOWN = 12
"""Characters of a version that people are shown."""
LATEST = "latest"
"""The alias that the bare name means: what was registered last, unless that was asked not to be served yet."""


class RecordDamaged(LoomError):
    """An adapter's rows contradict each other, such as an alias of a version that is not there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionRecord:
    """Content registered under an adapter's name. ``number`` counts from 1; ``id`` is its fingerprint.

    ``path``: where the store has it, a folder or a URI. ``source``: where it came from, as its registration said.
    """

    adapter: str
    id: str
    number: int
    path: str
    source: str
    created_at: datetime
    info: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterRecord:
    """An adapter: its versions by number, which of them each alias names, and which aliases engines keep in a slot."""

    name: str
    created_at: datetime
    versions: tuple[VersionRecord, ...]
    aliases: Mapping[str, str]
    pinned: frozenset[str] = frozenset()
    revision: int = 0

    @property
    def latest(self) -> VersionRecord:
        """The version that the bare name means. Raises RecordDamaged where there is none."""
        return self.version(self.aliases.get(LATEST, ""))

    def version(self, identifier: str) -> VersionRecord:
        """Raises RecordDamaged for one that the adapter does not have."""
        for version in self.versions:
            if version.id == identifier:
                return version
        raise RecordDamaged(
            f"The registry's rows of adapter '{self.name}' contradict each other: no version '{identifier[:SHOWN]}'.",
            adapter=self.name,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    """Who did what to what, when; ``details`` say how it was before and after."""

    id: int
    at: datetime
    actor: str
    action: str
    subject: str
    details: Mapping[str, Any]
