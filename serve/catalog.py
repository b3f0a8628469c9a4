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
from lora_runtime.errors import InvalidRequest, LoomError
from serve.engine_client import EngineClient
from serve.registry.repository import AdapterRecord, Repository
from serve.targets import NAME, Registered

log = logging.getLogger(__name__)

POLL_S = 0.5


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

    async def register(self, name: str, path: str) -> tuple[AdapterRecord, bool]:
        """Examine the adapter at ``path`` on an engine, then register it; returns it and whether it is new.

        Raises InvalidRequest for a bad name or a path outside the allowed folders, AdapterRejected or
        AdapterMissing for what the examination finds, Conflict where the name is taken.
        """
        self._check_name(name)
        folder = self._confined(path)
        info = await self._engines.examine(str(folder))
        found = await asyncio.to_thread(self._repository.add, name, info.version, str(folder), _jsonable(info))
        await self.refresh()
        return found

    async def remove(self, name: str) -> None:
        """Forget an adapter. Requests that already run with it end as they began. Raises NotFound."""
        await asyncio.to_thread(self._repository.remove, name)
        await self.refresh()

    async def refresh(self) -> None:
        """Read the registry if its revision moved."""
        revision = await asyncio.to_thread(self._repository.revision)
        if revision != self._revision:
            records = await asyncio.to_thread(self._repository.adapters)
            self._records = MappingProxyType({record.name: record for record in records})
            self._registered = MappingProxyType(
                {record.name: Registered(record.name, record.version, record.path) for record in records}
            )
            self._revision = revision

    async def _preload(self, name: str, folder: Path) -> None:
        self._check_name(name)
        info = await self._engines.examine(str(folder))
        known = self._records.get(name)
        if known is None or (known.version, known.path) != (info.version, str(folder)):
            await asyncio.to_thread(
                self._repository.add, name, info.version, str(folder), _jsonable(info), replace=True
            )

    async def _poll(self) -> None:
        while True:
            await asyncio.sleep(POLL_S)
            try:
                await self.refresh()
            except Exception as error:  # any database trouble: serve on with what is known
                log.warning("the registry cannot be read, serving the last snapshot: %s", type(error).__name__)

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


def _jsonable(info: AdapterInfo) -> dict[str, object]:
    fields = asdict(info)
    fields.pop("version")
    return fields
