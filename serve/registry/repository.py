"""Adapters, versions, aliases and the audit of the registry, read and changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any

from sqlalchemy import delete, select
from sqlalchemy.orm import Session, selectinload

from lora_runtime.errors import Conflict, NotFound, StoreUnavailable
from serve.registry.database import REVISION, Database
from serve.registry.experiment_tables import UseRow
from serve.registry.holds import Holds
from serve.registry.records import LATEST, SHOWN, AdapterRecord, AuditRecord, VersionRecord
from serve.registry.tables import AdapterRow, AliasRow, AuditRow, GarbageRow, RevisionRow, VersionRow

READ_AT_ONCE = 500
"""Names in one query; databases bound how many values one may have."""


class Repository:
    """Every change is one transaction, moves the revision, and leaves a row in the audit that names its ``actor``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._holds = Holds(database)

    def revision(self) -> int:
        """Grows with every change of any table."""
        with self._database.reading() as session:
            return session.execute(select(RevisionRow.number).where(RevisionRow.id == 1)).scalar_one()

    def adapters(self, known: Mapping[str, AdapterRecord] | None = None) -> dict[str, AdapterRecord]:
        """All adapters by name, in order. Those of ``known`` that did not change since are taken from there."""
        known = known or {}
        whole = select(AdapterRow).options(selectinload(AdapterRow.versions), selectinload(AdapterRow.aliases))
        with self._database.reading() as session:
            listed = session.execute(select(AdapterRow.name, AdapterRow.revision).order_by(AdapterRow.name)).all()
            old = {name for name, revision in listed if name in known and known[name].revision == revision}
            changed = [name for name, _ in listed if name not in old]
            found = {name: known[name] for name in old}
            for first in range(0, len(changed), READ_AT_ONCE):
                some = changed[first : first + READ_AT_ONCE]
                found |= {row.name: _adapter(row) for row in session.scalars(whole.where(AdapterRow.name.in_(some)))}
            return {name: found[name] for name, _ in listed if name in found}

    def audit(self, *, limit: int = 100, before: int | None = None, subject: str | None = None) -> list[AuditRecord]:
        """Changes, newest first, of everything or of ``subject``; ``before`` an id, to page on."""
        wanted = select(AuditRow).order_by(AuditRow.id.desc()).limit(limit)
        if subject is not None:
            wanted = wanted.where(AuditRow.subject == subject)
        if before is not None:
            wanted = wanted.where(AuditRow.id < before)
        with self._database.reading() as session:
            return [
                AuditRecord(
                    id=row.id,
                    at=aware(row.at),
                    actor=row.actor,
                    action=row.action,
                    subject=row.subject,
                    details=dict(row.details),
                )
                for row in session.scalars(wanted)
            ]

    def add(
        self,
        name: str,
        version: str,
        path: str,
        info: dict[str, Any],
        *,
        source: str = "",
        activate: bool = True,
        actor: str = "system",
        is_there: Callable[[], bool] = lambda: True,
    ) -> tuple[AdapterRecord, bool]:
        """Register content under a name; returns the adapter and whether the content is new to it.

        Other content than before becomes a further version. With ``activate`` it is what the bare name means from
        now on; an adapter's first version always is. Known content again takes the new ``path``.

        ``is_there`` says whether the store has the content. It may be slow: it is asked outside of the registry's
        lock, while a hold keeps the content from being deleted. Raises StoreUnavailable where it is gone.
        """
        with self._holds.registering(version) as use_hold:
            if not is_there():
                raise StoreUnavailable("The adapter's files were deleted meanwhile; register it again.")
            with self._database.changing() as session:
                use_hold(session)
                return _registered(session, name, version, path, info, source=source, activate=activate, actor=actor)

    def remove(self, name: str, *, actor: str = "system") -> None:
        """Forget an adapter with its versions and aliases; files stay. Raises NotFound, or Conflict while it is
        in use."""
        with self._database.changing() as session:
            adapter = _found(session, name)
            _check_unused(session, name, None)
            note(session, actor, "adapter.delete", name, versions=[row.id for row in adapter.versions])
            session.flush()
            session.execute(delete(AdapterRow).where(AdapterRow.name == name))

    def remove_version(self, name: str, version: str, *, actor: str = "system") -> None:
        """Forget one version. Raises NotFound, or Conflict while an alias names it or it is in use."""
        with self._database.changing() as session:
            adapter = _found(session, name)
            _version(adapter, version)
            _check_unused(session, name, version)
            adapter.revision = session.info[REVISION]
            if named := [alias.name for alias in adapter.aliases if alias.version == version]:
                raise Conflict(
                    f"'{name}@{version[:SHOWN]}' is what {', '.join(sorted(named))} means. Move the alias first, or "
                    "delete the adapter.",
                    aliases=sorted(named),
                )
            note(session, actor, "version.delete", f"{name}@{version}")
            session.flush()
            session.execute(delete(VersionRow).where(VersionRow.adapter == name, VersionRow.id == version))

    def set_alias(
        self, name: str, alias: str, version: str, *, pinned: bool | None = None, actor: str = "system"
    ) -> AdapterRecord:
        """Let ``alias`` name ``version`` from now on, and be ``pinned`` or not if that is given. Raises NotFound."""
        with self._database.changing() as session:
            adapter = _found(session, name)
            _version(adapter, version)
            adapter.revision = session.info[REVISION]
            row = _move(session, adapter, alias, version, actor)
            if pinned is not None and bool(row.is_pinned) != pinned:
                row.is_pinned = pinned
                note(session, actor, "alias.pin" if pinned else "alias.unpin", f"{name}@{alias}")
            session.flush()
            return _adapter(adapter)

    def remove_alias(self, name: str, alias: str, *, actor: str = "system") -> None:
        """Forget an alias. Raises NotFound, or Conflict for the one that the bare name means."""
        if alias == LATEST:
            raise Conflict(f"'{LATEST}' is what '{name}' alone means; move it, or delete the adapter.")
        with self._database.changing() as session:
            adapter = _found(session, name)
            row = next((row for row in adapter.aliases if row.name == alias), None)
            if row is None:
                raise NotFound(f"'{name}' has no alias '{alias}'.", near=[])
            adapter.revision = session.info[REVISION]
            note(session, actor, "alias.delete", f"{name}@{alias}", version=row.version)
            session.delete(row)


def _registered(
    session: Session,
    name: str,
    version: str,
    path: str,
    info: dict[str, Any],
    *,
    source: str,
    activate: bool,
    actor: str,
) -> tuple[AdapterRecord, bool]:
    """As :meth:`Repository.add`, in a transaction."""
    now = datetime.now(UTC)
    session.execute(delete(GarbageRow).where(GarbageRow.version == version))
    adapter = session.get(AdapterRow, name)
    if adapter is None:
        adapter = AdapterRow(name=name, created_at=now, versions=[], aliases=[])
        session.add(adapter)
    row = next((known for known in adapter.versions if known.id == version), None)
    is_new = row is None
    is_changed = row is None or (row.path, row.info) != (path, info)
    if row is None:
        number = max((known.number for known in adapter.versions), default=0) + 1
        row = VersionRow(id=version, number=number, path=path, source=source, info=info, created_at=now)
        adapter.versions.append(row)
    else:
        row.path, row.source, row.info = path, source, info
    session.flush()
    if is_changed:
        note(session, actor, "adapter.register", f"{name}@{version}", number=row.number, is_new=is_new)
    if activate or len(adapter.versions) == 1:
        _move(session, adapter, LATEST, version, actor)
    adapter.revision = session.info[REVISION]
    session.flush()
    return _adapter(adapter), is_new


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


def _check_unused(session: Session, name: str, version: str | None) -> None:
    wanted = select(UseRow.owner).where(UseRow.adapter == name).distinct().order_by(UseRow.owner)
    owners = list(session.scalars(wanted if version is None else wanted.where(UseRow.version == version)))
    if owners:
        shown = ", ".join(" ".join(owner.split("/", 1)) for owner in owners[:3])
        what = name if version is None else f"{name}@{version[:SHOWN]}"
        raise Conflict(f"'{what}' is what {shown} means. Move the alias, or archive the experiment.", owners=owners)


def _move(session: Session, adapter: AdapterRow, alias: str, version: str, actor: str) -> AliasRow:
    row = next((row for row in adapter.aliases if row.name == alias), None)
    before = None if row is None else row.version
    if row is not None and before == version:
        return row
    now = datetime.now(UTC)
    if row is None:
        row = AliasRow(name=alias, version=version, moved_at=now, is_pinned=False)
        adapter.aliases.append(row)
    else:
        row.version, row.moved_at = version, now
    note(session, actor, "alias.move", f"{adapter.name}@{alias}", before=before, after=version)
    return row


def note(session: Session, actor: str, action: str, subject: str, **details: Any) -> None:
    """Add a row to the audit, in the transaction of what it tells of."""
    session.add(AuditRow(at=datetime.now(UTC), actor=actor, action=action, subject=subject, details=details))


def _adapter(row: AdapterRow) -> AdapterRecord:
    return AdapterRecord(
        name=row.name,
        created_at=aware(row.created_at),
        versions=tuple(
            VersionRecord(
                adapter=row.name,
                id=version.id,
                number=version.number,
                path=version.path,
                source=version.source,
                created_at=aware(version.created_at),
                info=dict(version.info),
            )
            for version in row.versions
        ),
        aliases={alias.name: alias.version for alias in row.aliases},
        revision=row.revision,
        pinned=frozenset(alias.name for alias in row.aliases if alias.is_pinned),
    )


def aware(time: datetime) -> datetime:
    """SQLite keeps no time zone; what is written is UTC."""
    return time if time.tzinfo else time.replace(tzinfo=UTC)
