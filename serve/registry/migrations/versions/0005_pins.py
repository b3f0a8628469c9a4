"""Aliases that engines keep in a slot, and when each adapter changed last."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("adapters", sa.Column("revision", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("aliases", sa.Column("is_pinned", sa.Boolean(), nullable=False, server_default=sa.false()))
