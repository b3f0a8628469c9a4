"""A lock that at most one process holds, outside of any transaction, and that ends with the process that held it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout
from sqlalchemy import Connection, Engine
from sqlalchemy.exc import DBAPIError

from serve.registry.errors import RegistryNotWritable, translated

COLLECTING = 0x4C6F6F6E
"""Held by the process that collects garbage. PostgreSQL knows its advisory locks by number."""
RECOUNTING = 0x4C6F6F70
"""Held by the process that counts an experiment's rows anew."""


class Sole:
    """The lock while it is held."""

    def check(self) -> None:
        """Raises RegistryUnavailable where the lock was lost, with the connection that it depends on."""


@contextmanager
def sole(engine: Engine, number: int) -> Iterator[Sole | None]:
    """The lock ``number``, or None where another process holds it. Does not wait. Raises RegistryUnavailable.

    PostgreSQL: an advisory lock of a session, so connections must not be pooled by transaction. SQLite: a lock on a
    file beside the database, which the kernel releases when its holder dies.
    """
    locked = _sole_postgres if engine.dialect.name == "postgresql" else _sole_file
    with locked(engine, number) as held:
        yield held


class _Session(Sole):
    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def check(self) -> None:
        with translated():
            self._connection.exec_driver_sql("SELECT 1")


@contextmanager
def _sole_postgres(engine: Engine, number: int) -> Iterator[Sole | None]:
    with translated():
        connection = engine.connect().execution_options(isolation_level="AUTOCOMMIT")
    try:
        with translated():
            is_mine = connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({number})").scalar_one()
        yield _Session(connection) if is_mine else None
    finally:
        _unlock(connection, number)
        connection.close()


def _unlock(connection: Connection, number: int) -> None:
    try:
        connection.exec_driver_sql(f"SELECT pg_advisory_unlock({number})")
    except DBAPIError:
        connection.invalidate()  # the server ends the lock when it sees the connection closed


@contextmanager
def _sole_file(engine: Engine, number: int) -> Iterator[Sole | None]:
    lock = FileLock(f"{engine.url.database}.{number:x}.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        yield None
        return
    except OSError as error:
        message = f"The lock file beside the registry's database cannot be written: {error.strerror}."
        raise RegistryNotWritable(message, retry_after_s=5) from error
    try:
        yield Sole()
    finally:
        lock.release()
