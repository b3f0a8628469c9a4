"""Reading and changing the registry. Calls block; the gateway makes them off its event loop."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event, select, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict, NotFound
from serve.registry.tables import AdapterRow, RevisionRow, Table

BUSY_TIMEOUT_S = 10


@dataclass(frozen=True, slots=True)
class AdapterRecord:
    """An adapter as registered."""

    name: str
    version: str
    path: str
    created_at: datetime
    info: dict[str, Any]


class Repository:
    """The registry behind one database URL. Safe for several processes at once."""

    def __init__(self, url: str) -> None:
        """Connects and makes the tables where they are absent."""
        parsed = make_url(url)
        if parsed.get_backend_name() == "sqlite" and parsed.database not in (None, "", ":memory:"):
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        self._engine = create_engine(parsed, pool_pre_ping=True)
        if parsed.get_backend_name() == "sqlite":
            _tune_sqlite(self._engine)
        Table.metadata.create_all(self._engine)
        with Session(self._engine) as session:
            if session.get(RevisionRow, 1) is None:
                session.add(RevisionRow(id=1, number=0))
                try:
                    session.commit()
                except IntegrityError:  # another process was first
                    session.rollback()

    def revision(self) -> int:
        """Grows with every change of any table."""
        with Session(self._engine) as session:
            return session.execute(select(RevisionRow.number).where(RevisionRow.id == 1)).scalar_one()

    def adapters(self) -> list[AdapterRecord]:
        """All adapters by name."""
        with Session(self._engine) as session:
            return [_record(row) for row in session.scalars(select(AdapterRow).order_by(AdapterRow.name))]

    def add(
        self, name: str, version: str, path: str, info: dict[str, Any], *, replace: bool = False
    ) -> tuple[AdapterRecord, bool]:
        """Register an adapter; returns it and whether it is new. Raises Conflict where the name is taken by
        other content (unless ``replace``); equal content again is no error, and takes the new path."""
        with self._changing() as session:
            row = session.get(AdapterRow, name, with_for_update=True)
            if row is not None and row.version != version and not replace:
                raise Conflict(
                    f"'{name}' is registered with other content ({row.version[:12]}). Choose another name, "
                    f"or delete it first.",
                    name=name,
                )
            is_new = row is None
            if row is None:
                row = AdapterRow(name=name, created_at=datetime.now(UTC))
                session.add(row)
            row.version, row.path, row.info = version, path, info
            session.flush()
            return _record(row), is_new

    def remove(self, name: str) -> None:
        """Forget an adapter; its files stay. Raises NotFound."""
        with self._changing() as session:
            row = session.get(AdapterRow, name)
            if row is None:
                raise NotFound(f"There is no adapter '{name}'.", near=[])
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


def _record(row: AdapterRow) -> AdapterRecord:
    created = row.created_at if row.created_at.tzinfo else row.created_at.replace(tzinfo=UTC)
    return AdapterRecord(row.name, row.version, row.path, created, dict(row.info))


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.close()
