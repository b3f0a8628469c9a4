"""Merge jobs, and the checkpoints that came of them."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "merges",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(128), nullable=False),
        sa.Column("target", sa.String(4096), nullable=False, server_default=""),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("plan_id", sa.String(64), nullable=False),
        sa.Column("actor", sa.String(128), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True)),
        sa.Column("ended_at", sa.DateTime(timezone=True)),
        sa.Column("trials", sa.JSON(), nullable=False),
        sa.Column("report", sa.JSON(none_as_null=True)),
        sa.Column("error", sa.Text()),
        sa.Column("is_cancelled", sa.Boolean(), nullable=False, server_default=sa.false()),
        sa.Column("owner", sa.String(64), nullable=False, server_default=""),
        sa.Column("fence", sa.Integer(), nullable=False, server_default="0"),
        sa.Column("leased_until", sa.DateTime(timezone=True)),
    )
    op.create_index("ix_merges_open", "merges", ["state", "created_at"])
    op.create_table(
        "merge_units",
        sa.Column("job", sa.String(32), sa.ForeignKey("merges.id", ondelete="CASCADE"), primary_key=True),
        sa.Column("unit", sa.String(255), primary_key=True),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("kind", sa.String(16), nullable=False),
        sa.Column("state", sa.String(16), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("done_bytes", sa.BigInteger(), nullable=False, server_default="0"),
        sa.Column("node", sa.String(64), nullable=False, server_default=""),
        sa.Column("seconds", sa.Float()),
        sa.Column("peak_bytes", sa.BigInteger()),
    )
    op.create_table(
        "merge_logs",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("job", sa.String(32), sa.ForeignKey("merges.id", ondelete="CASCADE"), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("level", sa.String(16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
    )
    op.create_index("ix_merge_logs_job", "merge_logs", ["job", "id"])
    op.create_table(
        "checkpoints",
        sa.Column("name", sa.String(128), primary_key=True),
        sa.Column("version", sa.String(64), nullable=False),
        sa.Column("location", sa.String(4096), nullable=False),
        sa.Column("base", sa.String(4096), nullable=False),
        sa.Column("job", sa.String(32), sa.ForeignKey("merges.id"), nullable=False),
        sa.Column("parents", sa.JSON(), nullable=False),
        sa.Column("num_bytes", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
    )
