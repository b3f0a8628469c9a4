"""Garbage that is being deleted from the store is claimed, so that deleting needs no lock."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("garbage", sa.Column("claimed_at", sa.DateTime(timezone=True)))
