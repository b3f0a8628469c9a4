"""What a store needs: where a version came from, who holds it, and what nobody names any more."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("versions", sa.Column("source", sa.String(4096), nullable=False, server_default=""))
    op.create_table(
        "holds",
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("holder", sa.String(128), primary_key=True),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
    )
    op.create_table(
        "garbage",
        sa.Column("version", sa.String(64), primary_key=True),
        sa.Column("seen_at", sa.DateTime(timezone=True), nullable=False),
    )
