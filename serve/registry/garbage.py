"""Collecting what the store has and nobody names: seen once, taken away when it was still so much later."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, select
from sqlalchemy.orm import Session

from lora_runtime.store.protocol import Store
from serve.registry.database import Database
from serve.registry.repository import aware
from serve.registry.tables import GarbageRow, HoldRow, VersionRow


class Garbage:
    """What may leave the store, and what may not.

    An entry goes when no registered version and no hold has named it for ``grace``, which is longer than any request
    lives: what an engine may still read stays. An entry published or published again within ``grace`` stays too, so
    that nothing goes between its arrival and its registration, which asks under the same lock (``Repository.add``).
    """

    def __init__(self, database: Database, store: Store, grace: timedelta) -> None:
        self._database = database
        self._store = store
        self._grace = grace

    def collect(self) -> list[str]:
        """Take away what may go, and what was half received; returns the versions. Raises StoreUnavailable."""
        versions = list(self._store.versions())
        now = datetime.now(UTC)
        with self._database.alone() as session:
            named = _named(session, now)
            seen = {row.version: aware(row.seen_at) for row in session.scalars(select(GarbageRow))}
            session.execute(delete(GarbageRow).where(GarbageRow.version.in_(named & set(seen))))
            unnamed = [version for version in versions if version not in named]
            session.add_all(GarbageRow(version=v, seen_at=now) for v in unnamed if v not in seen)
            removed = [v for v in unnamed if v in seen and self._is_due(v, seen[v], now)]
            for version in removed:
                self._store.remove(version)
                session.execute(delete(GarbageRow).where(GarbageRow.version == version))
        self._store.sweep(self._grace.total_seconds())
        return removed

    def hold(self, version: str, holder: str, seconds: float) -> None:
        """Keep ``version`` in the store for so long, whether or not it is registered; again prolongs it."""
        with self._database.alone() as session:
            expires_at = datetime.now(UTC) + timedelta(seconds=seconds)
            session.merge(HoldRow(version=version, holder=holder, expires_at=expires_at))

    def release(self, holder: str) -> None:
        """End all holds of ``holder``."""
        with self._database.alone() as session:
            session.execute(delete(HoldRow).where(HoldRow.holder == holder))

    def _is_due(self, version: str, seen_at: datetime, now: datetime) -> bool:
        # Asked here, under the lock: it may have been published anew since the versions were listed.
        published_at = self._store.published_at(version) or seen_at
        return max(seen_at, published_at) < now - self._grace


def _named(session: Session, now: datetime) -> set[str]:
    """Versions that an adapter or a hold names."""
    held = select(HoldRow.version).where(HoldRow.expires_at > now)
    return {*session.scalars(select(VersionRow.id)), *session.scalars(held)}
