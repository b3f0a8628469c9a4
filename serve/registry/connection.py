"""Engines on the registry's database: durable writes, real snapshots, and a limit on every wait.

SQLite: WAL with ``synchronous=FULL``, so that a commit is on disk when it returns, and transactions that this module
begins itself, since Python's driver begins none before a SELECT. PostgreSQL: limits for connecting, locks and
statements on the server, and a deadline here for a server that no longer answers.
"""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import DBAPIError, InvalidatePoolError

CONNECT_LIMIT_S = 5
LOCK_LIMIT_S = 10
STATEMENT_LIMIT_S = 30
POOL_LIMIT_S = 10
PING_LIMIT_S = 3
_BEGIN = "loom_begin"
_CHECK_EVERY = 10_000
"""Instructions of SQLite's virtual machine between two looks at the clock: less than a millisecond."""


def engine_of(url: str) -> Engine:
    """An engine on the database at ``url``; SQLite's folder is made."""
    parsed = make_url(url)
    if parsed.get_backend_name() == "sqlite":
        if parsed.database not in (None, "", ":memory:"):
            Path(str(parsed.database)).parent.mkdir(parents=True, exist_ok=True)
        engine = create_engine(parsed)
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    engine = create_engine(parsed, pool_timeout=POOL_LIMIT_S, connect_args=_libpq(parsed))
    event.listen(engine, "connect", _limit_postgres)
    event.listen(engine, "checkout", _ping_of(engine))
    return engine


def reader(engine: Engine) -> Engine:
    """The same engine, whose transactions each read one snapshot and change nothing."""
    if engine.dialect.name == "sqlite":
        return engine
    return engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)


def writer(engine: Engine) -> Engine:
    """The same engine, whose transactions may write. SQLite's take the write lock when they begin: one that read
    first could not get it any more once another had written."""
    return engine.execution_options(**{_BEGIN: "BEGIN IMMEDIATE"}) if engine.dialect.name == "sqlite" else engine


@contextmanager
def deadline(connection: Connection, seconds: float) -> Iterator[None]:
    """End whatever ``connection`` waits for once ``seconds`` have passed; it raises then as it does for a lost
    connection. Where the server itself keeps the limits, this is for one that does not answer at all."""
    with _deadline_of(connection.connection.dbapi_connection, seconds):
        yield


@contextmanager
def _deadline_of(dbapi_connection: Any, seconds: float) -> Iterator[None]:
    if hasattr(dbapi_connection, "set_progress_handler"):
        ends = time.monotonic() + seconds
        dbapi_connection.set_progress_handler(lambda: time.monotonic() > ends, _CHECK_EVERY)
        try:
            yield
        finally:
            dbapi_connection.set_progress_handler(None, 0)
        return
    cut = _Cut(dbapi_connection)
    timer = threading.Timer(seconds, cut.now)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
        cut.never()


class _Cut:
    """Shuts a connection's socket down from another thread, which wakes whoever waits for its answer."""

    def __init__(self, dbapi_connection: Any) -> None:
        self._connection = dbapi_connection
        self._lock = threading.Lock()
        self._is_over = False

    def now(self) -> None:
        with self._lock:
            if self._is_over or self._connection.closed:
                return
            # On a duplicate, so that closing it here leaves the driver its own descriptor.
            with suppress(OSError), socket.socket(fileno=os.dup(self._connection.fileno())) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)

    def never(self) -> None:
        """From here on the connection may serve another transaction."""
        with self._lock:
            self._is_over = True


def _libpq(url: URL) -> dict[str, Any]:
    """libpq's limits for connecting and for a peer that is gone; what the URL says comes first."""
    wanted = {
        "connect_timeout": CONNECT_LIMIT_S,
        "keepalives_idle": CONNECT_LIMIT_S,
        "keepalives_interval": CONNECT_LIMIT_S,
        "keepalives_count": 2,
        "tcp_user_timeout": LOCK_LIMIT_S * 1000,
    }
    return {name: value for name, value in wanted.items() if name not in url.query}


def _limit_postgres(connection: Any, record: Any) -> None:
    """The server's own limits. Set here, since poolers refuse them in ``options`` of a connection's start."""
    limits = {
        "lock_timeout": LOCK_LIMIT_S,
        "statement_timeout": STATEMENT_LIMIT_S,
        "idle_in_transaction_session_timeout": 2 * STATEMENT_LIMIT_S,
    }
    with _deadline_of(connection, CONNECT_LIMIT_S), connection.cursor() as cursor:
        for name, seconds in limits.items():
            cursor.execute(f"SET SESSION {name} = '{seconds}s'")
        connection.commit()
    record.info["is_new"] = True


def _ping_of(engine: Engine) -> Any:
    """A check of each connection before its use, as ``pool_pre_ping`` makes it, but with a limit."""

    def ping(dbapi_connection: Any, record: Any, _: Any) -> None:
        if record.info.pop("is_new", False):
            return
        try:
            with _deadline_of(dbapi_connection, PING_LIMIT_S):
                engine.dialect.do_ping(dbapi_connection)
        except (engine.dialect.loaded_dbapi.Error, DBAPIError) as error:
            # The pool drops this connection and the others of its age, and connects again.
            raise InvalidatePoolError("the connection was lost") from error

    return ping


def _prepare_sqlite(connection: Any, _: Any) -> None:
    connection.isolation_level = None  # the driver begins nothing by itself; _begin_sqlite does
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={LOCK_LIMIT_S * 1000}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.execute("PRAGMA foreign_keys=ON")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(_BEGIN, "BEGIN"))
