"""A gateway's view of the adapters: a snapshot in memory, and the only way to change them.

Requests read the snapshot and never the database.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_runtime.engine.protocol import AdapterInfo, AdapterRef
from lora_runtime.errors import InvalidRequest, LoomError, NotFound
from lora_runtime.store.protocol import Store
from serve.engine_client import EngineClient
from serve.follower import Follower
from serve.identity import Identity
from serve.intake import Admitted, Source
from serve.registry.records import AdapterRecord, AuditRecord, VersionRecord
from serve.registry.repository import Repository
from serve.targets import ALIAS, NAME, Registered

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _View:
    """Everything at one revision, replaced as a whole: it is read while the next one is being made."""

    records: Mapping[str, AdapterRecord]
    registered: Mapping[str, Registered]

    def adapter(self, name: str) -> AdapterRecord:
        """Raises NotFound."""
        found = self.records.get(name)
        if found is None:
            raise NotFound(f"There is no adapter '{name[:128]}'.", near=[])
        return found


class Catalog:
    """Adapters by name. Used from one event loop. ``actor`` is who the audit says made a change."""

    def __init__(
        self, repository: Repository, engines: EngineClient, store: Store, follower: Follower, *, base_name: str
    ) -> None:
        self._repository = repository
        self._follower = follower
        self._engines = engines
        self._store = store
        self._base_name = base_name
        self._view = _View({}, {})
        follower.add(self._reload)

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        return self._view.records

    @property
    def registered(self) -> Mapping[str, Registered]:
        return self._view.registered

    def adapter(self, name: str) -> AdapterRecord:
        """Raises NotFound."""
        return self._view.adapter(name)

    def version(self, name: str, version: str) -> tuple[AdapterRecord, VersionRecord]:
        """An adapter, and the version of it that an alias or the beginning of one means. Raises NotFound."""
        view = self._view
        record = view.adapter(name)
        return record, record.version(view.registered[name].version(version))

    async def catch_up(self) -> None:
        """Know what any gateway acknowledged before now, as far as the registry can be read."""
        await self._follower.catch_up()

    async def preload(self, preload: Mapping[str, Path]) -> None:
        """Register what the configuration names."""
        for name, path in preload.items():
            try:
                await self._preload(name, path.expanduser().resolve())
            except LoomError as error:
                # One broken adapter must not keep the base and the others from being served.
                log.error("preloading adapter %s failed: %s", name, error)
        await self._follower.refresh()

    async def register(
        self, name: str, source: Source, *, actor: str, activate: bool = True
    ) -> tuple[AdapterRecord, bool]:
        """Have an engine take the adapter into the store, then register it; returns it and whether its content is new.

        Other content than before is a further version, and what the bare name means unless ``activate`` is false.
        Raises InvalidRequest for a bad name, and what ``Intake.admit`` raises.
        """
        self.check_name(name)
        admitted = await self._engines.admit(source)
        if activate and name in self._view.records:
            # Requests are coming for this name; those of a new one are yet to come.
            ref = AdapterRef(version=admitted.info.version, path=admitted.location, name=name)
            await self._engines.prefetch(ref)
        found = await self._add(name, source, admitted, activate=activate, actor=actor)
        await self._follower.refresh()
        return found

    async def set_alias(
        self, name: str, alias: str, version: str, *, pinned: bool | None = None, actor: str
    ) -> AdapterRecord:
        """Let ``alias`` mean ``version`` (an alias, or the beginning of a version), after engines were told to have
        it at hand; ``pinned`` as the repository takes it. Requests that run end as they began.

        Raises InvalidRequest for a name that cannot be an alias's, NotFound."""
        if not ALIAS.fullmatch(alias):
            raise InvalidRequest(
                f"'{alias[:64]}' cannot be an alias: use letters, digits, '.', '_' and '-', at most 64, and not only "
                "hexadecimal digits, which would read like a version.",
                param="alias",
            )
        await self._follower.refresh()
        _, found = self.version(name, version)
        await self._engines.prefetch(AdapterRef(version=found.id, path=found.path, name=name))
        record = await asyncio.to_thread(self._repository.set_alias, name, alias, found.id, pinned=pinned, actor=actor)
        await self._follower.refresh()
        return record

    async def remove(self, name: str, *, identity: Identity) -> None:
        """Forget an adapter. Requests that already run with it end as they began. Raises NotFound, or Conflict while
        it is in use."""
        await asyncio.to_thread(self._repository.remove, name, actor=identity.actor, may_see=_seen_by(identity))
        await self._follower.refresh()

    async def remove_alias(self, name: str, alias: str, *, actor: str) -> None:
        """Forget an alias. Raises NotFound, or Conflict for the one that the bare name means."""
        await asyncio.to_thread(self._repository.remove_alias, name, alias, actor=actor)
        await self._follower.refresh()

    async def remove_version(self, name: str, version: str, *, identity: Identity) -> str:
        """Forget a version; returns it whole. Raises NotFound, or Conflict while an alias names it."""
        await self._follower.refresh()
        _, found = self.version(name, version)
        may_see = _seen_by(identity)
        await asyncio.to_thread(self._repository.remove_version, name, found.id, actor=identity.actor, may_see=may_see)
        await self._follower.refresh()
        return found.id

    async def audit(self, *, limit: int, before: int | None) -> list[AuditRecord]:
        """Changes of the registry, newest first."""
        return await asyncio.to_thread(self._repository.audit, limit=limit, before=before)

    def _reload(self) -> None:
        before = self._view
        records = self._repository.adapters(before.records)
        registered = {
            name: before.registered[name] if before.records.get(name) is record else registered_of(record)
            for name, record in records.items()
        }
        self._view = _View(records, registered)

    async def _preload(self, name: str, folder: Path) -> None:
        self.check_name(name)
        source = Source(address=str(folder))
        admitted = await self._engines.admit(source)
        known = self._view.records.get(name)
        locations = {} if known is None else {version.id: version.path for version in known.versions}
        version = admitted.info.version
        if locations.get(version) != admitted.location:
            # Content that was there before is not put in front again: an alias may have been moved since.
            await self._add(name, source, admitted, activate=version not in locations, actor="configuration")

    async def _add(
        self, name: str, source: Source, admitted: Admitted, *, activate: bool, actor: str
    ) -> tuple[AdapterRecord, bool]:
        version = admitted.info.version
        return await asyncio.to_thread(
            self._repository.add,
            name,
            version,
            admitted.location,
            _jsonable(admitted.info),
            source=source.address or "upload",
            activate=activate,
            actor=actor,
            is_there=lambda: self._store.holds(version),
        )

    def check_name(self, name: str) -> None:
        """Raises InvalidRequest for what no adapter may be called."""
        if not NAME.fullmatch(name) or name == self._base_name:
            raise InvalidRequest(
                f"'{name[:128]}' cannot be an adapter's name: use letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, and not the base's name.",
                param="name",
            )


def _seen_by(identity: Identity) -> Callable[[str], bool]:
    """Which owners of uses ``identity`` may hear of: aliases that it reaches; with unrestricted reach, all."""
    return lambda owner: identity.may_use(owner.removeprefix("alias/")) if identity.adapters is not None else True


def registered_of(record: AdapterRecord) -> Registered:
    """What targets need to know of an adapter."""
    versions = {version.id: version.path for version in record.versions}
    return Registered(record.name, record.latest.id, versions, record.aliases)


def _jsonable(info: AdapterInfo) -> dict[str, object]:
    """As the registry gives it back: what is registered again unchanged must compare equal, and JSON has no tuples."""
    fields: dict[str, object] = json.loads(json.dumps(asdict(info)))
    fields.pop("version")
    return fields
