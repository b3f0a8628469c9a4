"""Bringing the database's tables to the revision that this release has."""

from __future__ import annotations

from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from serve.registry.connection import writer
from serve.registry.errors import RegistryTooNew

MIGRATIONS = Path(__file__).parent / "migrations"
MIGRATION_LIMIT_S = 600
"""How long one process waits for another's migration, and how long a statement of one may take."""
_LOCK = 0x4C6F6F6D
"""PostgreSQL's advisory lock for migrations: only one process migrates at a time."""


def migrate(engine: Engine, revision: str = "head") -> None:
    """Bring the tables to ``revision``; processes that start at once take turns. No lock is taken where there is
    nothing to do. Raises RegistryTooNew, and what the driver raises."""
    config = Config()
    config.set_main_option("script_location", str(MIGRATIONS).replace("%", "%%"))
    scripts = ScriptDirectory.from_config(config)
    with engine.connect() as connection:
        if _is_current(connection, scripts, revision):
            return
    with writer(engine).begin() as connection:
        if engine.dialect.name == "postgresql":
            for limit in ("lock_timeout", "statement_timeout"):
                connection.exec_driver_sql(f"SET LOCAL {limit} = '{MIGRATION_LIMIT_S}s'")
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_LOCK})")
        if _is_current(connection, scripts, revision):  # another process was faster
            return
        config.attributes["connection"] = connection
        command.upgrade(config, revision)


def _is_current(connection: Connection, scripts: ScriptDirectory, revision: str) -> bool:
    """Whether nothing has to be migrated. Raises RegistryTooNew for a revision of a later release."""
    found = MigrationContext.configure(connection).get_current_heads()
    known = {script.revision for script in scripts.walk_revisions()}
    newest = scripts.get_current_head()
    if unknown := sorted(set(found) - known):
        raise RegistryTooNew(
            f"The registry's database is at revision {', '.join(unknown)}; this release of Loom knows revisions up to "
            f"{newest}. Run the release that migrated it, or restore a backup from before.",
            found=unknown,
            known=newest,
        )
    wanted = newest if revision == "head" else revision
    return found == (wanted,)
