"""Versions, aliases and the audit. What an adapter held becomes its version 1 and its alias ``latest``."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "versions",
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("path", sa.String(4096), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("info", sa.JSON(), nullable=False),
        sa.UniqueConstraint("adapter", "number", name="uq_versions_adapter_number"),
    )
    op.create_table(
        "aliases",
        sa.Column("adapter", sa.String(128), sa.ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True),
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("moved_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"], name="fk_aliases_version"),
    )
    op.create_table(
        "audit",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("action", sa.String(64), nullable=False),
        sa.Column("subject", sa.String(256), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
    )
    op.execute(
        "INSERT INTO versions (adapter, id, number, path, created_at, info) "
        "SELECT name, version, 1, path, created_at, info FROM adapters"
    )
    op.execute(
        "INSERT INTO aliases (adapter, name, version, moved_at) "
        "SELECT name, 'latest', version, created_at FROM adapters"
    )
    # SQLite drops columns itself since 3.35; a copy of the table would take the new rows with it.
    for column in ("version", "path", "info"):
        op.drop_column("adapters", column)
    op.execute("UPDATE revision SET number = number + 1")
