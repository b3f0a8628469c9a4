"""One database behind a URL: SQLite or PostgreSQL, migrated to the newest tables before its first use.

Calls block; the gateway makes them off its event loop. Safe for several processes at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alembic import command
from alembic.config import Config
from sqlalchemy import Connection, Engine, create_engine, event, update
from sqlalchemy.engine import make_url
from sqlalchemy.exc import InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout
from sqlalchemy.orm import Session

from lora_runtime.errors import LoomError
from serve.registry.tables import RevisionRow

MIGRATIONS = Path(__file__).parent / "migrations"
BUSY_TIMEOUT_S = 10
REVISION = "revision"
"""Where a changing session tells the revision that it makes."""
_LOCK = 0x4C6F6F6D
"""PostgreSQL's advisory lock for migrations: only one process migrates at a time."""


class RegistryUnavailable(LoomError):
    """The database cannot be reached, or is busy for too long; what was to be changed was not."""


class Database:
    """The registry's database, and the transactions that are made in it."""

    def __init__(self, url: str) -> None:
        """Connects, and brings the tables up to date."""
        self._engine = connect(url)

    @contextmanager
    def reading(self) -> Iterator[Session]:
        """A transaction that changes nothing. Raises RegistryUnavailable, as all of these do."""
        with _translated(), Session(self._engine) as session:
            yield session

    @contextmanager
    def changing(self) -> Iterator[Session]:
        """A transaction that moves the revision, alone among its like; nothing is kept if it fails."""
        with self._locked(RevisionRow.number + 1) as session:
            yield session

    @contextmanager
    def alone(self) -> Iterator[Session]:
        """As :meth:`changing`, for what readers of the revision need not know of."""
        with self._locked(RevisionRow.number) as session:
            yield session

    @contextmanager
    def adding(self) -> Iterator[Session]:
        """A transaction that only adds rows which nobody changes, or claims one; it waits for no writer's lock."""
        with _translated(), Session(self._engine) as session:
            yield session
            session.commit()

    def close(self) -> None:
        self._engine.dispose()

    @contextmanager
    def _locked(self, revision: Any) -> Iterator[Session]:
        with _translated(), Session(self._engine) as session:
            # The revision first: the row's lock puts writers in line before they read anything.
            moved = update(RevisionRow).where(RevisionRow.id == 1).values(number=revision)
            session.info[REVISION] = session.execute(moved.returning(RevisionRow.number)).scalar_one()
            yield session
            session.commit()


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (OperationalError, InterfaceError, InternalError, PoolTimeout) as error:
        message = "The registry's database cannot be reached now; nothing was changed. Try again shortly."
        raise RegistryUnavailable(message, retry_after_s=2) from error


def connect(url: str) -> Engine:
    """An engine on the database at ``url``, its folder made and its tables migrated."""
    parsed = make_url(url)
    is_sqlite = parsed.get_backend_name() == "sqlite"
    if is_sqlite and parsed.database not in (None, "", ":memory:"):
        Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
    engine = create_engine(parsed, pool_pre_ping=True)
    if is_sqlite:
        _tune_sqlite(engine)
    migrate(engine)
    return engine


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to ``revision``; processes that start at once take turns."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    with _alone(engine) as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


@contextmanager
def _alone(engine: Engine) -> Iterator[Connection]:
    """A transaction that no other migration runs beside, and that is kept or undone as a whole."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            # Python's sqlite3 begins no transaction before DDL, so it is begun and ended by hand.
            connection = connection.execution_options(isolation_level="AUTOCOMMIT")
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            try:
                yield connection
            except BaseException:
                connection.exec_driver_sql("ROLLBACK")
                raise
            connection.exec_driver_sql("COMMIT")
            return
        with connection.begin():
            if engine.dialect.name == "postgresql":
                connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
            yield connection


def _tune_sqlite(engine: Engine) -> None:
    @event.listens_for(engine, "connect")
    def _on_connect(connection: Any, _: Any) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_TIMEOUT_S * 1000}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()
