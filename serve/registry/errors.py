"""Errors of the registry's database, and the one place where SQLAlchemy's exceptions become them.

RegistryUnavailable            the database cannot be used now; a retry may succeed
├── RegistryBusy               another writer held the lock, or the database did not answer in time
├── RegistryNotWritable        its disk is full, or it is read-only
├── RegistryCounting           an experiment's requests are being counted anew
└── RegistryOutcomeUnknown     the connection was lost during a commit
RegistryStale                  this process has not been able to refresh its copy for too long
RegistryTooNew                 a newer release of Loom has migrated the database
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from sqlalchemy.exc import DatabaseError, DBAPIError, IntegrityError, InterfaceError, InternalError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from lora_runtime.errors import LoomError

RETRY_AFTER_S = 2


class RegistryUnavailable(LoomError):
    """The database cannot be reached or used now. A change was not made, unless the subclass says otherwise."""


class RegistryBusy(RegistryUnavailable):
    """A lock, a connection of the pool or an answer did not come within its time limit."""


class RegistryNotWritable(RegistryUnavailable):
    """The database takes no writes: its disk is full, or it is read-only. Reads still work."""


class RegistryCounting(RegistryUnavailable):
    """Sums of an experiment's phase are being made anew from all of its rows, and cannot be read until then."""


class RegistryOutcomeUnknown(RegistryUnavailable):
    """The connection was lost while a change was being committed, so it may have been made."""


class RegistryStale(LoomError):
    """This process's copy of the registry is older than ``registry.max_age_s``. ``facts``: ``age_s``."""


class RegistryTooNew(LoomError):
    """The database has a schema revision that this release does not know. ``facts``: ``found`` and ``known``."""


_NOT_WRITABLE = {
    "SQLITE_FULL": "its disk is full",
    "SQLITE_READONLY": "it is read-only",
    "SQLITE_IOERR": "its disk cannot be written or read",
    "53100": "its disk is full",
    "25006": "it is read-only",
}
_UNREACHABLE = {"SQLITE_CANTOPEN": "its file cannot be opened for writing"}
_BUSY = {
    "SQLITE_BUSY": "another process holds its lock",
    "SQLITE_INTERRUPT": "it took too long",
    "55P03": "another process holds a lock",
    "40P01": "of a deadlock with another change",
    "57014": "it took too long",
}


@contextmanager
def translated(*, is_commit: bool = False) -> Iterator[None]:
    """Raise what the database's drivers raise as RegistryUnavailable or a subclass. ``is_commit``: a lost connection
    leaves the outcome unknown. Errors in the statements themselves pass."""
    try:
        yield
    except PoolTimeout as error:
        raise RegistryBusy(_message("all connections are in use"), retry_after_s=RETRY_AFTER_S) from error
    except DBAPIError as error:
        if not _is_trouble(error):
            raise
        raise _typed(error, is_commit) from error


def _is_trouble(error: DBAPIError) -> bool:
    """Whether the database failed, rather than a statement being wrong. SQLite reports a damaged file as a bare
    DatabaseError."""
    is_operational = isinstance(error, (OperationalError, InterfaceError, InternalError))
    return not isinstance(error, IntegrityError) and (is_operational or type(error) is DatabaseError)


def _typed(error: DBAPIError, is_commit: bool) -> RegistryUnavailable:
    code = _code(error)
    # The driver reports a lost connection without a code of the server's; 57P.. is a server that shuts down.
    if is_commit and (code is None or code.startswith("57P")):
        return RegistryOutcomeUnknown(
            "The connection to the registry's database was lost during a commit; the change may have been made. "
            "Check before you repeat it.",
            retry_after_s=RETRY_AFTER_S,
        )
    kinds = ((RegistryNotWritable, _NOT_WRITABLE), (RegistryBusy, _BUSY), (RegistryUnavailable, _UNREACHABLE))
    for kind, reasons in kinds:
        for known, reason in reasons.items():
            if code is not None and code.startswith(known):  # SQLite's extended codes begin with the primary one
                return kind(_message(reason), retry_after_s=RETRY_AFTER_S)
    return RegistryUnavailable(_message(None), retry_after_s=RETRY_AFTER_S)


def _code(error: DBAPIError) -> str | None:
    """SQLite's name of the error or PostgreSQL's SQLSTATE; None where the server said nothing."""
    found = getattr(error.orig, "sqlite_errorname", None) or getattr(error.orig, "sqlstate", None)
    return None if found is None else str(found)


def _message(reason: str | None) -> str:
    because = "" if reason is None else f", because {reason}"
    return f"The registry's database cannot be used now{because}; nothing was changed. Try again shortly."
