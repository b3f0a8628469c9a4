"""Alembic's entry point. The connection is the caller's (``database.migrate``), who also ends its transaction."""

from alembic import context

from serve.registry import experiment_tables, merge_tables  # noqa: F401  # their tables are in the metadata then
from serve.registry.tables import Table

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Table.metadata,
    render_as_batch=True,  # SQLite alters tables by copying them
    compare_type=True,
)
context.run_migrations()
