"""Taking adapters in: fetched, examined, published in the store. Nothing is ever half there."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from lora_runtime.engine.protocol import AdapterInfo, Examiner
from lora_runtime.errors import AdapterMissing, AdapterRejected
from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.protocol import Store
from lora_runtime.store.sources import Sources


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Where an adapter is to be taken from: a folder's path or a URI, or what was uploaded under a receipt."""

    address: str = ""
    receipt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admitted:
    """An adapter that was examined and lies in the store at ``location``."""

    info: AdapterInfo
    location: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Named:
    """A registered version that a merge is to take in, by the name that its recipe has for it."""

    adapter: str
    version: str
    location: str


class Intake:
    """The road of an adapter's bytes into the store."""

    def __init__(self, store: Store, sources: Sources, copies: LocalCopies, examiner: Examiner) -> None:
        self._store = store
        self._sources = sources
        self._copies = copies
        self._examine = examiner.examine

    async def admit(self, source: Source) -> Admitted:
        """Raises InvalidRequest for a place that is not allowed, NotFound for a receipt that nothing is under,
        AdapterMissing or AdapterRejected for what the examination finds, StoreUnavailable."""
        known = None if source.receipt else await self._known(source.address)
        if known is not None:
            return known
        with self._store.staging() as folder:
            if source.receipt:
                await asyncio.to_thread(self._store.take, source.receipt, folder)
            else:
                await asyncio.to_thread(self._sources.fetch, source.address, folder)
            info = await self._examine(str(folder))
            location = await asyncio.to_thread(self._store.publish, folder, info.version)
        return Admitted(info=info, location=location)

    async def _known(self, address: str) -> Admitted | None:
        """The adapter in the folder ``address`` as the store has it; None where it has to be fetched."""
        version = await asyncio.to_thread(self._sources.version_in_place, address)
        if version is None or not await asyncio.to_thread(self._store.holds, version):
            return None
        location = self._store.location(version)
        try:
            folder = await asyncio.to_thread(self._copies.folder_of, location, version)
            info = await self._examine(str(folder))
        except (AdapterRejected, AdapterMissing):
            return None
        if info.version != version:  # what the store has is damaged; publishing repairs it
            return None
        await asyncio.to_thread(self._store.renew, version)
        return Admitted(info=info, location=location)
