"""Collecting what the store has and nobody names: seen once, deleted when it was still unnamed so much later.

The store is only asked outside of the registry's lock. An entry is *claimed* in one transaction, deleted, and the
deletion is *confirmed* in another. One process collects at a time (``sole.py``), so claims that a collector finds were
left by one that died; they are void after a minute (``holds.py``).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Iterator, Sequence
from datetime import datetime, timedelta

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict
from lora_runtime.store.protocol import Store
from serve.registry.database import Database
from serve.registry.holds import Clock, Holds, now_utc
from serve.registry.repository import aware
from serve.registry.sole import COLLECTING, Sole
from serve.registry.tables import GarbageRow, HoldRow, VersionRow

CLAIMED_AT_ONCE = 16
"""Entries whose registration is refused while they are deleted, a few seconds in a bucket."""
NOTED_AT_ONCE = 500
JUMP_S = 60.0
"""The clock was set if it ran so much faster than the monotonic clock between two collections."""


class CollectionRunning(Conflict):
    """Another process collects garbage now."""


class Garbage:
    """What may leave the store, and what may not.

    An entry goes when no registered version and no hold has named it for ``grace``, which is longer than any request
    lives: what an engine may still read stays. An entry that was published, also again, within ``grace`` stays too.
    """

    def __init__(self, database: Database, store: Store, grace: timedelta, *, clock: Clock = now_utc) -> None:
        self._database = database
        self._store = store
        self._grace = grace
        self._clock = clock
        self._holds = Holds(database, clock)
        self._offset_s = self._clock_offset_s()

    def collect(self) -> list[str]:
        """Delete what may go, and what was half received; returns the versions that went.

        Raises CollectionRunning, StoreUnavailable, RegistryUnavailable; what was deleted by then is accounted for.
        """
        with self._database.sole(COLLECTING) as lock:
            if lock is None:
                raise CollectionRunning("Another process collects garbage now; wait until it is done.", retry_after_s=5)
            self._holds.void_old_claims()
            seen = self._look()
            due = [version for version, seen_at in seen.items() if self._is_due(version, seen_at)]
            removed = [version for some in _batches(due, CLAIMED_AT_ONCE) for version in self._delete(some, lock)]
            self._store.sweep(self._grace.total_seconds())
        return removed

    def hold(self, version: str, holder: str, seconds: float) -> None:
        """Keep ``version`` in the store for so long, whether or not it is registered; again prolongs it. Raises
        StoreUnavailable while it is being deleted."""
        self._holds.hold(version, holder, seconds)

    def release(self, holder: str) -> None:
        """End all holds of ``holder``."""
        self._holds.release(holder)

    def _look(self) -> dict[str, datetime]:
        """Take note of what nobody names; returns what was noted before, and when it was first seen so."""
        there = set(self._store.versions())
        now = self._clock()
        with self._database.reading() as session:
            named = _named(session, now)
            seen = {row.version: aware(row.seen_at) for row in session.scalars(select(GarbageRow))}
        unnamed = there - named
        for gone in _batches(sorted(set(seen) - unnamed), NOTED_AT_ONCE):
            with self._database.alone() as session:
                session.execute(delete(GarbageRow).where(GarbageRow.version.in_(gone)))
        # Times that the clock cannot be trusted about count from now on.
        restarted = set(seen) if self._clock_was_set() else {v for v, seen_at in seen.items() if seen_at > now}
        for fresh in _batches(sorted((unnamed - set(seen)) | (unnamed & restarted)), NOTED_AT_ONCE):
            with self._database.alone() as session:
                for version in set(fresh) - _named(session, now, fresh):
                    session.merge(GarbageRow(version=version, seen_at=now))
        return {version: seen[version] for version in sorted(unnamed & set(seen) - restarted)}

    def _is_due(self, version: str, seen_at: datetime) -> bool:
        published_at = self._store.published_at(version) or seen_at
        return max(seen_at, published_at) < self._clock() - self._grace

    def _delete(self, versions: Sequence[str], lock: Sole) -> list[str]:
        claimed = self._claim(versions)
        removed: list[str] = []
        try:
            for version, seen_at in claimed.items():
                # Again, since it may have been published again before it was claimed.
                if self._is_due(version, seen_at):
                    lock.check()
                    self._store.remove(version)
                    removed.append(version)
        finally:
            self._confirm(removed, claimed)
        return removed

    def _claim(self, versions: Sequence[str]) -> dict[str, datetime]:
        """Those of ``versions`` that are still unnamed, and when they were seen so: none of them can be registered
        or held until the claim ends."""
        now = self._clock()
        with self._database.alone() as session:
            named = _named(session, now, versions)
            free = select(GarbageRow).where(GarbageRow.version.in_(versions), GarbageRow.claimed_at.is_(None))
            rows = session.scalars(free)
            claimed = {row.version: aware(row.seen_at) for row in rows if row.version not in named}
            session.execute(delete(HoldRow).where(HoldRow.version.in_(claimed)))  # those that expired
            session.execute(update(GarbageRow).where(GarbageRow.version.in_(claimed)).values(claimed_at=now))
        return claimed

    def _confirm(self, removed: Collection[str], claimed: Collection[str]) -> None:
        with self._database.alone() as session:
            session.execute(delete(GarbageRow).where(GarbageRow.version.in_(removed)))
            session.execute(update(GarbageRow).where(GarbageRow.version.in_(claimed)).values(claimed_at=None))

    def _clock_was_set(self) -> bool:
        """Whether the wall clock jumped forward since the last collection."""
        before, self._offset_s = self._offset_s, self._clock_offset_s()
        return self._offset_s - before > JUMP_S

    def _clock_offset_s(self) -> float:
        return self._clock().timestamp() - time.monotonic()


def _named(session: Session, now: datetime, among: Collection[str] | None = None) -> set[str]:
    """Versions that an adapter or a hold names; only those ``among`` some, if given."""
    registered, held = select(VersionRow.id), select(HoldRow.version).where(HoldRow.expires_at > now)
    if among is not None:
        registered = registered.where(VersionRow.id.in_(among))
        held = held.where(HoldRow.version.in_(among))
    return {*session.scalars(registered), *session.scalars(held)}


def _batches(versions: Sequence[str], size: int) -> Iterator[Sequence[str]]:
    return (versions[first : first + size] for first in range(0, len(versions), size))
