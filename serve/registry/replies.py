"""What requests with idempotency keys answered, so that a repeated one changes nothing."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import delete, update

from lora_runtime.errors import Conflict, InvalidRequest
from serve.registry.database import Database
from serve.registry.repository import aware
from serve.registry.tables import IdempotencyRow

KEPT_FOR = timedelta(hours=24)
RENEWED_EVERY = timedelta(seconds=10)
GIVEN_UP_AFTER = timedelta(minutes=1)
"""A request that was not renewed for so long died with its gateway; a repeated one takes its place. So does one for a
request that was renewed so far in the future: the clock was set back since."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reply:
    status: int
    content_type: str
    body: bytes


class Replies:
    """Replies by owner (an API key's id) and the owner's own key."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def begin(self, owner: str, key: str, request: str) -> Reply | None:
        """The reply that this request had, or None where it is to be carried out now, by the caller alone.

        ``request`` is its fingerprint. Raises InvalidRequest for a key that stood for another request, Conflict while
        the first one runs.
        """
        now = datetime.now(UTC)
        with self._database.alone() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.begun_at < now - KEPT_FOR))
            row = session.get(IdempotencyRow, (owner, key))
            if row is not None and row.request != request:
                raise InvalidRequest(
                    "This idempotency key stood for another request; choose a new one for each.",
                    param="Idempotency-Key",
                )
            if row is not None and row.status is not None:
                return Reply(status=row.status, content_type=row.content_type, body=row.body)
            if row is not None and abs(now - aware(row.begun_at)) < GIVEN_UP_AFTER:
                raise Conflict("The first request with this idempotency key still runs.", retry_after_s=1)
            session.merge(
                IdempotencyRow(owner=owner, key=key, request=request, begun_at=now, content_type="", body=b"")
            )
            return None

    def renew(self, owner: str, key: str) -> None:
        """The request still runs. To be called every :data:`RENEWED_EVERY` until it has ended."""
        running = (IdempotencyRow.owner == owner, IdempotencyRow.key == key, IdempotencyRow.status.is_(None))
        with self._database.alone() as session:
            session.execute(update(IdempotencyRow).where(*running).values(begun_at=datetime.now(UTC)))

    def finish(self, owner: str, key: str, reply: Reply) -> None:
        """Keep what was answered."""
        with self._database.alone() as session:
            row = session.get(IdempotencyRow, (owner, key))
            if row is not None:
                row.status, row.content_type, row.body = reply.status, reply.content_type, reply.body

    def forget(self, owner: str, key: str) -> None:
        """Nothing came of it: the next request with this key is carried out."""
        with self._database.alone() as session:
            session.execute(delete(IdempotencyRow).where(IdempotencyRow.owner == owner, IdempotencyRow.key == key))
