"""Reading and changing the registry. Calls block; the gateway makes them off its event loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select, update
from sqlalchemy.orm import Session, selectinload

from lora_runtime.errors import Conflict, NotFound
from serve.registry.database import connect
from serve.registry.records import LATEST, AdapterRecord, AuditRecord, VersionRecord
from serve.registry.tables import AdapterRow, AliasRow, AuditRow, RevisionRow, VersionRow

SHOWN = 12
"""Characters of a version in messages."""


class Repository:
    """The registry behind one database URL. Safe for several processes at once.

    Every change is one transaction, moves the revision, and leaves a row in the audit that names its ``actor``.
    """

    def __init__(self, url: str) -> None:
        """Connects, and brings the tables up to date."""
        self._engine = connect(url)

    def revision(self) -> int:
        """Grows with every change of any table."""
        with Session(self._engine) as session:
            return session.execute(select(RevisionRow.number).where(RevisionRow.id == 1)).scalar_one()

    def adapters(self) -> list[AdapterRecord]:
        """All adapters by name."""
        wanted = select(AdapterRow).options(selectinload(AdapterRow.versions), selectinload(AdapterRow.aliases))
        with Session(self._engine) as session:
            return [_adapter(row) for row in session.scalars(wanted.order_by(AdapterRow.name))]

    def audit(self, *, limit: int = 100, before: int | None = None) -> list[AuditRecord]:
        """Changes, newest first; ``before`` an id, to page on."""
        wanted = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(AuditRow.id < before)
        with Session(self._engine) as session:
            return [
                AuditRecord(
                    id=row.id,
                    at=_aware(row.at),
                    actor=row.actor,
                    action=row.action,
                    subject=row.subject,
                    details=dict(row.details),
                )
                for row in session.scalars(wanted)
            ]

    def add(
        self, name: str, version: str, path: str, info: dict[str, Any], *, activate: bool = True, actor: str = "system"
    ) -> tuple[AdapterRecord, bool]:
        """Register content under a name; returns the adapter and whether the content is new to it.

        Other content than before becomes a further version. With ``activate`` it is what the bare name means from
        now on; an adapter's first version always is. Known content again takes the new ``path``.
        """
        now = datetime.now(UTC)
        with self._changing() as session:
            adapter = session.get(AdapterRow, name)
            if adapter is None:
                adapter = AdapterRow(name=name, created_at=now, versions=[], aliases=[])
                session.add(adapter)
            row = next((known for known in adapter.versions if known.id == version), None)
            is_new = row is None
            if row is None:
                number = max((known.number for known in adapter.versions), default=0) + 1
                row = VersionRow(id=version, number=number, path=path, info=info, created_at=now)
                adapter.versions.append(row)
            before = row.path, row.info
            row.path, row.info = path, info
            session.flush()
            if is_new or before != (path, info):
                _note(session, actor, "adapter.register", f"{name}@{version}", number=row.number, is_new=is_new)
            if activate or len(adapter.versions) == 1:
                _move(session, adapter, LATEST, version, actor)
            session.flush()
            return _adapter(adapter), is_new

    def remove(self, name: str, *, actor: str = "system") -> None:
        """Forget an adapter with its versions and aliases; files stay. Raises NotFound."""
        with self._changing() as session:
            adapter = _found(session, name)
            _note(session, actor, "adapter.delete", name, versions=[row.id for row in adapter.versions])
            session.flush()
            session.execute(delete(AdapterRow).where(AdapterRow.name == name))

    def remove_version(self, name: str, version: str, *, actor: str = "system") -> None:
        """Forget one version. Raises NotFound, or Conflict while an alias names it."""
        with self._changing() as session:
            adapter = _found(session, name)
            _version(adapter, version)
            if named := [alias.name for alias in adapter.aliases if alias.version == version]:
                raise Conflict(
                    f"'{name}@{version[:SHOWN]}' is what {', '.join(sorted(named))} means. Move the alias first, or "
                    "delete the adapter.",
                    aliases=sorted(named),
                )
            _note(session, actor, "version.delete", f"{name}@{version}")
            session.flush()
            session.execute(delete(VersionRow).where(VersionRow.adapter == name, VersionRow.id == version))

    def set_alias(self, name: str, alias: str, version: str, *, actor: str = "system") -> AdapterRecord:
        """Let ``alias`` name ``version`` from now on. Raises NotFound."""
        with self._changing() as session:
            adapter = _found(session, name)
            _version(adapter, version)
            _move(session, adapter, alias, version, actor)
            session.flush()
            return _adapter(adapter)

    def remove_alias(self, name: str, alias: str, *, actor: str = "system") -> None:
        """Forget an alias. Raises NotFound, or Conflict for the one that the bare name means."""
        if alias == LATEST:
            raise Conflict(f"'{LATEST}' is what '{name}' alone means; move it, or delete the adapter.")
        with self._changing() as session:
            row = next((row for row in _found(session, name).aliases if row.name == alias), None)
            if row is None:
                raise NotFound(f"'{name}' has no alias '{alias}'.", near=[])
            _note(session, actor, "alias.delete", f"{name}@{alias}", version=row.version)
            session.delete(row)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _changing(self) -> Iterator[Session]:
        """A transaction that moves the revision; nothing is kept if it fails."""
        with Session(self._engine) as session:
            # The revision first: the row's lock puts writers in line before they read anything.
            session.execute(update(RevisionRow).where(RevisionRow.id == 1).values(number=RevisionRow.number + 1))
            yield session
            session.commit()


def _found(session: Session, name: str) -> AdapterRow:
    row = session.get(AdapterRow, name)
    if row is None:
        raise NotFound(f"There is no adapter '{name}'.", near=[])
    return row


def _version(adapter: AdapterRow, version: str) -> VersionRow:
    row = next((row for row in adapter.versions if row.id == version), None)
    if row is None:
        raise NotFound(f"'{adapter.name}' has no version '{version[:SHOWN]}'.", near=[])
    return row


def _move(session: Session, adapter: AdapterRow, alias: str, version: str, actor: str) -> None:
    row = next((row for row in adapter.aliases if row.name == alias), None)
    before = None if row is None else row.version
    if before == version:
        return
    now = datetime.now(UTC)
    if row is None:
        adapter.aliases.append(AliasRow(name=alias, version=version, moved_at=now))
    else:
        row.version, row.moved_at = version, now
    _note(session, actor, "alias.move", f"{adapter.name}@{alias}", before=before, after=version)


def _note(session: Session, actor: str, action: str, subject: str, **details: Any) -> None:
    session.add(AuditRow(at=datetime.now(UTC), actor=actor, action=action, subject=subject, details=details))


def _adapter(row: AdapterRow) -> AdapterRecord:
    return AdapterRecord(
        name=row.name,
        created_at=_aware(row.created_at),
        versions=tuple(
            VersionRecord(
                adapter=row.name,
                id=version.id,
                number=version.number,
                path=version.path,
                created_at=_aware(version.created_at),
                info=dict(version.info),
            )
            for version in row.versions
        ),
        aliases={alias.name: alias.version for alias in row.aliases},
    )


def _aware(time: datetime) -> datetime:
    """SQLite keeps no time zone; what is written is UTC."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
