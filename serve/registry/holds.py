"""Holds: versions that must stay in the store although no adapter names them, or not yet.

A hold and a claim (``garbage.py``) exclude each other: each is set in a transaction that checks for the other. So what
is held is not being deleted, and what was found in the store under a hold is still there when the hold is used.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, update
from sqlalchemy.orm import Session

from lora_runtime.errors import StoreUnavailable
from serve.registry.database import Database
from serve.registry.errors import RegistryUnavailable
from serve.registry.sole import COLLECTING
from serve.registry.tables import GarbageRow, HoldRow

REGISTRATION_S = 600.0
"""How long a registration's hold lasts if its process dies; it is needed for the time of one look into the store."""
CLAIM_S = 60.0
"""A claim that is older is void if no process collects. It is not void at once, since a collector that lost its
connection, and with it the lock, may still be deleting one entry."""

FORGOTTEN_AFTER = timedelta(days=1)

Clock = Callable[[], datetime]


def now_utc() -> datetime:
    return datetime.now(UTC)


class Holds:
    """Versions and who holds them. Calls block; all raise RegistryUnavailable."""

    def __init__(self, database: Database, clock: Clock = now_utc) -> None:
        self._database = database
        self._clock = clock

    def hold(self, version: str, holder: str, seconds: float) -> None:
        """Keep ``version`` from being deleted for so long; again prolongs it. Raises StoreUnavailable while it is
        being deleted."""
        for _ in range(2):
            with self._database.alone() as session:
                if not _is_claimed(session, version):
                    expires_at = self._clock() + timedelta(seconds=seconds)
                    session.merge(HoldRow(version=version, holder=holder, expires_at=expires_at))
                    return
            with self._database.sole(COLLECTING) as lock:
                if lock is not None:
                    self.void_old_claims()
        raise StoreUnavailable(
            f"Version {version[:12]} is being deleted from the store because nothing named it; register the adapter "
            "again in a moment.",
            retry_after_s=5,
        )

    def release(self, holder: str) -> None:
        """End all holds of ``holder``."""
        with self._database.alone() as session:
            session.execute(delete(HoldRow).where(HoldRow.holder == holder))

    @contextmanager
    def registering(self, version: str) -> Iterator[Callable[[Session], None]]:
        """Hold ``version`` while it is looked for in the store and registered.

        Gives a function to call in the registering transaction: it ends the hold, and raises StoreUnavailable where
        the hold ran out and the version may have been deleted.
        """
        holder = f"register/{uuid.uuid4().hex}"
        self.hold(version, holder, REGISTRATION_S)

        def use(session: Session) -> None:
            mine = delete(HoldRow).where(HoldRow.version == version, HoldRow.holder == holder)
            # A collector that claims a version deletes its expired holds, so a hold that is there was never ignored.
            if session.execute(mine.returning(HoldRow.holder)).first() is None:
                raise StoreUnavailable("The adapter's files may have been deleted meanwhile; register it again.")

        try:
            yield use
        except BaseException:
            self._release_if_possible(holder)
            raise

    def _release_if_possible(self, holder: str) -> None:
        try:
            self.release(holder)
        except RegistryUnavailable:
            return  # the hold expires by itself; the error that is being raised says more

    def void_old_claims(self) -> None:
        """Give up claims of a collector that died, and forget holds that ran out long ago. Only for who holds the lock
        ``COLLECTING``."""
        now, margin = self._clock(), timedelta(seconds=CLAIM_S)
        # Claims from the future too: the clock was set back since.
        is_old = (GarbageRow.claimed_at < now - margin) | (GarbageRow.claimed_at > now + margin)
        with self._database.alone() as session:
            session.execute(update(GarbageRow).where(is_old).values(claimed_at=None))
            session.execute(delete(HoldRow).where(HoldRow.expires_at < now - FORGOTTEN_AFTER))


def _is_claimed(session: Session, version: str) -> bool:
    row = session.get(GarbageRow, version)
    return row is not None and row.claimed_at is not None
