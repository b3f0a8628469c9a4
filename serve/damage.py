"""Whose fault it is that a registered version cannot be read: ours, where the store has lost or changed its bytes.

An adapter that a client submits is examined before it is registered, and what is wrong with it then is the client's
fault (AdapterRejected, 4xx). Once it is registered, the store answers for its bytes.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import AdapterMissing, AdapterRejected, LoomError, StoreUnavailable, VersionDamaged
from lora_runtime.folder import fingerprint
from lora_runtime.store.copies import LocalCopies
from lora_runtime.store.factory import local_path
from serve.registry.records import SHOWN


@asynccontextmanager
async def store_answers_for(refs: Iterable[AdapterRef], copies: LocalCopies) -> AsyncIterator[None]:
    """Raise VersionDamaged in place of AdapterRejected and AdapterMissing where the files of one of ``refs`` are not
    what was registered; StoreUnavailable where only this machine's copy is, which is then fetched again.

    Hashes the files after such an error, off the event loop. An error about sound files passes as it is.
    """
    try:
        yield
    except (AdapterRejected, AdapterMissing) as error:
        damage = await asyncio.to_thread(damage_of, list(refs), copies)
        if damage is None:
            raise
        raise damage from error


def damage_of(refs: Iterable[AdapterRef], copies: LocalCopies) -> LoomError | None:
    """What is wrong with the stored files of the first of ``refs`` that is not sound. Blocks."""
    for ref in refs:
        try:
            found = fingerprint(copies.folder_of(ref.path, ref.version))
        except (AdapterRejected, AdapterMissing) as error:
            return damaged(ref.name, ref.version, error.message)
        except StoreUnavailable as error:
            return error
        if found == ref.version:
            continue
        if local_path(ref.path) is None:
            copies.discard(ref.version)
            return StoreUnavailable(
                f"This machine's copy of '{ref.name}@{ref.version[:SHOWN]}' was damaged and is fetched again.",
                retry_after_s=1,
            )
        return damaged(ref.name, ref.version, f"its files hash to {found[:SHOWN]}")
    return None


def damaged(name: str, version: str, what: str) -> VersionDamaged:
    return VersionDamaged(
        f"The store has lost or changed the files of '{name}@{version[:SHOWN]}': {what.rstrip('.')}. An operator must "
        "restore them from a backup, or register or upload the same adapter again, which repairs the version.",
        name=name,
        version=version,
    )
