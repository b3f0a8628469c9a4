"""API keys in the registry: made, listed, revoked."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta

from sqlalchemy import select

from lora_runtime.errors import InvalidRequest, NotFound
from serve.identity import Identity, KeyRecord, Scope, digest_of, new_key
from serve.registry.database import Database
from serve.registry.repository import aware, note
from serve.registry.tables import ApiKeyRow


class Keys:
    """The keys of one registry. Every change leaves a row in the audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(
        self,
        name: str,
        scopes: Collection[Scope],
        *,
        adapters: Collection[str] | None = None,
        requests_per_minute: int | None = None,
        max_concurrent: int | None = None,
        lifetime: timedelta | None = None,
        actor: str = "system",
    ) -> tuple[str, KeyRecord]:
        """A new key, in clear this once, and its record. Raises InvalidRequest."""
        if not name or not scopes:
            raise InvalidRequest("A key needs a name and at least one scope.", param="scopes")
        identifier, key = new_key()
        now = datetime.now(UTC)
        row = ApiKeyRow(
            id=identifier,
            name=name,
            digest=digest_of(key),
            scopes=sorted(scopes),
            adapters=None if adapters is None else sorted(adapters),
            requests_per_minute=requests_per_minute,
            max_concurrent=max_concurrent,
            created_at=now,
            expires_at=None if lifetime is None else now + lifetime,
        )
        with self._database.changing() as session:
            session.add(row)
            note(session, actor, "key.create", identifier, name=name, scopes=row.scopes, adapters=row.adapters)
            session.flush()
            return key, _record(row)

    def revoke(self, identifier: str, *, actor: str = "system") -> None:
        """End a key's validity, within a poll of every gateway; again changes nothing. Raises NotFound."""
        with self._database.changing() as session:
            row = session.get(ApiKeyRow, identifier)
            if row is None:
                raise NotFound(f"There is no API key '{identifier[:64]}'.", near=[])
            if row.revoked_at is None:
                row.revoked_at = datetime.now(UTC)
                note(session, actor, "key.revoke", identifier, name=row.name)

    def all(self) -> list[KeyRecord]:
        """Every key there ever was, oldest first."""
        with self._database.reading() as session:
            return [_record(row) for row in session.scalars(select(ApiKeyRow).order_by(ApiKeyRow.created_at))]


def _record(row: ApiKeyRow) -> KeyRecord:
    identity = Identity(
        id=row.id,
        name=row.name,
        scopes=frozenset(Scope(scope) for scope in row.scopes),
        adapters=None if row.adapters is None else tuple(row.adapters),
        requests_per_minute=row.requests_per_minute,
        max_concurrent=row.max_concurrent,
    )
    return KeyRecord(
        identity=identity,
        digest=row.digest,
        created_at=aware(row.created_at),
        expires_at=row.expires_at and aware(row.expires_at),
        revoked_at=row.revoked_at and aware(row.revoked_at),
    )
