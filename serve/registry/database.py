"""One database behind a URL: SQLite or PostgreSQL, migrated to the newest tables before its first use.

Calls block, each within the limits of ``connection.py``; the gateway makes them off its event loop. Safe for several
processes at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from sqlalchemy import Engine, update
from sqlalchemy.orm import Session

from serve.registry.connection import deadline, engine_of, reader, writer
from serve.registry.errors import translated
from serve.registry.schema import migrate
from serve.registry.sole import Sole, sole
from serve.registry.tables import RevisionRow

REVISION = "revision"
"""Where a changing session tells the revision that it makes."""
READ_LIMIT_S = 20.0
WRITE_LIMIT_S = 60.0


class Database:
    """The registry's database, and the transactions that are made in it. All of them raise RegistryUnavailable or
    one of its subclasses when the database fails."""

    def __init__(self, url: str) -> None:
        """Connects, and brings the tables up to date. Raises RegistryTooNew."""
        self._engine = connect(url)
        self._reader, self._writer = reader(self._engine), writer(self._engine)
        self._local = threading.local()

    @contextmanager
    def reading(self, limit_s: float = READ_LIMIT_S) -> Iterator[Session]:
        """A transaction that changes nothing and sees one state of the database throughout; it is cut off after
        ``limit_s``. A read inside another one of the same thread sees the outer one's state."""
        outer: Session | None = getattr(self._local, "session", None)
        if outer is not None:
            with translated():
                yield outer
            return
        with translated(), Session(self._reader) as session, deadline(session.connection(), limit_s):
            self._local.session = session
            try:
                yield session
            finally:
                self._local.session = None

    @contextmanager
    def changing(self) -> Iterator[Session]:
        """A transaction that moves the revision, alone among its like; nothing is kept if it fails. Nothing slow
        belongs inside: everybody else who writes waits for it."""
        with self._locked(RevisionRow.number + 1) as session:
            yield session

    @contextmanager
    def alone(self) -> Iterator[Session]:
        """As :meth:`changing`, for what readers of the revision need not know of."""
        with self._locked(RevisionRow.number) as session:
            yield session

    @contextmanager
    def adding(self) -> Iterator[Session]:
        """A transaction that only adds rows which nobody changes, or claims one. On PostgreSQL it waits for no
        writer's lock; SQLite has one lock for all writers."""
        with translated(), Session(self._writer) as session, deadline(session.connection(), WRITE_LIMIT_S):
            yield session
            _commit(session)

    def sole(self, number: int) -> AbstractContextManager[Sole | None]:
        """A lock outside of any transaction; see :func:`serve.registry.sole.sole`."""
        return sole(self._engine, number)

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _locked(self, revision: Any) -> Iterator[Session]:
        with self.adding() as session:
            # The revision first: the row's lock puts writers in line before they read anything.
            moved = update(RevisionRow).where(RevisionRow.id == 1).values(number=revision)
            session.info[REVISION] = session.execute(moved.returning(RevisionRow.number)).scalar_one()
            yield session


def _commit(session: Session) -> None:
    session.flush()
    with translated(is_commit=True):
        session.commit()


def connect(url: str) -> Engine:
    """An engine on the database at ``url``, its tables migrated. Raises RegistryUnavailable, RegistryTooNew."""
    with translated():
        engine = engine_of(url)
        migrate(engine)
        return engine
