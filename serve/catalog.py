"""A gateway's view of the registry: a snapshot in memory, renewed when the registry's revision moves.

Requests read the snapshot and never the database. If the database goes away, the last snapshot serves on.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from types import MappingProxyType

from lora_runtime.engine.protocol import AdapterInfo
from lora_runtime.errors import InvalidRequest, LoomError, NotFound
from serve.engine_client import EngineClient
from serve.registry.records import AdapterRecord, AuditRecord
from serve.registry.repository import Repository
from serve.targets import ALIAS, NAME, Registered

log = logging.getLogger(__name__)

POLL_S = 0.5
ACTOR = "http"
"""Who the audit says made a change; requests have no identity yet."""


class Catalog:
    """Adapters by name, and the only way to change them. Used from one event loop."""

    def __init__(
        self, repository: Repository, engines: EngineClient, *, base_name: str, roots: tuple[Path, ...]
    ) -> None:
        self._repository = repository
        self._engines = engines
        self._base_name = base_name
        self._roots = tuple(root.expanduser().resolve() for root in roots)
        self._records: Mapping[str, AdapterRecord] = MappingProxyType({})
        self._registered: Mapping[str, Registered] = MappingProxyType({})
        self._revision = -1
        self._poller: asyncio.Task[None] | None = None

    @property
    def records(self) -> Mapping[str, AdapterRecord]:
        return self._records

    @property
    def registered(self) -> Mapping[str, Registered]:
        return self._registered

    async def start(self, preload: Mapping[str, Path]) -> None:
        """Register what the configuration names, then follow the registry."""
        await self.refresh()
        for name, path in preload.items():
            try:
                await self._preload(name, path.expanduser().resolve())
            except LoomError as error:
                # One broken adapter must not keep the base and the others from being served.
                log.error("preloading adapter %s failed: %s", name, error)
        await self.refresh()
        self._poller = asyncio.create_task(self._poll())

    async def stop(self) -> None:
        if self._poller is not None:
            self._poller.cancel()
            with suppress(asyncio.CancelledError):
                await self._poller
        self._repository.close()

    async def register(self, name: str, path: str, *, activate: bool = True) -> tuple[AdapterRecord, bool]:
        """Examine the adapter at ``path`` on an engine, then register it; returns it and whether its content is new.

        Other content than before is a further version, and what the bare name means unless ``activate`` is false.
        Raises InvalidRequest for a bad name or a path outside the allowed folders, AdapterRejected or
        AdapterMissing for what the examination finds.
        """
        self._check_name(name)
        folder = self._confined(path)
        info = await self._engines.examine(str(folder))
        found = await asyncio.to_thread(
            self._repository.add, name, info.version, str(folder), _jsonable(info), activate=activate, actor=ACTOR
        )
        await self.refresh()
        return found

    async def set_alias(self, name: str, alias: str, version: str) -> AdapterRecord:
        """Let ``alias`` mean ``version`` (an alias, or the beginning of a version). Requests that run end as they
        began. Raises InvalidRequest for a name that cannot be an alias's, NotFound."""
        if not ALIAS.fullmatch(alias):
            raise InvalidRequest(
                f"'{alias[:64]}' cannot be an alias: use letters, digits, '.', '_' and '-', at most 64, and not only "
                "hexadecimal digits, which would read like a version.",
                param="alias",
            )
        await self.refresh()
        exact = self._known(name).version(version)
        record = await asyncio.to_thread(self._repository.set_alias, name, alias, exact, actor=ACTOR)
        await self.refresh()
        return record

    async def remove(self, name: str) -> None:
        """Forget an adapter. Requests that already run with it end as they began. Raises NotFound."""
        await asyncio.to_thread(self._repository.remove, name, actor=ACTOR)
        await self.refresh()

    async def remove_alias(self, name: str, alias: str) -> None:
        """Forget an alias. Raises NotFound, or Conflict for the one that the bare name means."""
        await asyncio.to_thread(self._repository.remove_alias, name, alias, actor=ACTOR)
        await self.refresh()

    async def remove_version(self, name: str, version: str) -> str:
        """Forget a version; returns it whole. Raises NotFound, or Conflict while an alias names it."""
        await self.refresh()
        exact = self._known(name).version(version)
        await asyncio.to_thread(self._repository.remove_version, name, exact, actor=ACTOR)
        await self.refresh()
        return exact

    async def audit(self, *, limit: int, before: int | None) -> list[AuditRecord]:
        """Changes of the registry, newest first."""
        return await asyncio.to_thread(self._repository.audit, limit=limit, before=before)

    async def refresh(self) -> None:
        """Read the registry if its revision moved."""
        revision = await asyncio.to_thread(self._repository.revision)
        if revision != self._revision:
            records = await asyncio.to_thread(self._repository.adapters)
            self._records = MappingProxyType({record.name: record for record in records})
            self._registered = MappingProxyType({record.name: _registered(record) for record in records})
            self._revision = revision

    async def _preload(self, name: str, folder: Path) -> None:
        self._check_name(name)
        info = await self._engines.examine(str(folder))
        known = self._records.get(name)
        paths = {} if known is None else {version.id: version.path for version in known.versions}
        if paths.get(info.version) != str(folder):
            # Content that was there before is not put in front again: an alias may have been moved since.
            await asyncio.to_thread(
                self._repository.add,
                name,
                info.version,
                str(folder),
                _jsonable(info),
                activate=info.version not in paths,
                actor="configuration",
            )

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception as error:  # any database trouble: serve on with what is known
                log.warning("the registry cannot be read, serving the last snapshot: %s", type(error).__name__)

    def _known(self, name: str) -> Registered:
        found = self._registered.get(name)
        if found is None:
            raise NotFound(f"There is no adapter '{name[:128]}'.", near=[])
        return found

    def _check_name(self, name: str) -> None:
        if not NAME.fullmatch(name) or name == self._base_name:
            raise InvalidRequest(
                f"'{name[:128]}' cannot be an adapter's name: use letters, digits, '.', '_' and '-', "
                "beginning with a letter or digit, and not the base's name.",
                param="name",
            )

    def _confined(self, path: str) -> Path:
        if "\0" in path:
            raise InvalidRequest("The path holds a NUL character.", param="path")
        try:
            folder = Path(path).expanduser().resolve()
        except (OSError, RuntimeError) as error:
            raise InvalidRequest("The path cannot be resolved.", param="path") from error
        if not any(folder.is_relative_to(root) for root in self._roots):
            raise InvalidRequest(
                "The path is outside the folders that adapters may lie in (setting adapters.roots).", param="path"
            )
        return folder


def _registered(record: AdapterRecord) -> Registered:
    versions = {version.id: version.path for version in record.versions}
    return Registered(record.name, record.latest.id, versions, record.aliases)


def _jsonable(info: AdapterInfo) -> dict[str, object]:
    fields = asdict(info)
    fields.pop("version")
    return fields
