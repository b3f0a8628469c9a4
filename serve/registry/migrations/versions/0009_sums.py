"""Experiments' sums are kept up as events come. Phases from before are counted once, in the background."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "effects",
        sa.Column("id", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), nullable=False),
        sa.Column("experiment", sa.String(length=32), nullable=False),
        sa.Column("phase", sa.Integer(), nullable=False),
        sa.Column("size", sa.Integer(), nullable=False),
        sa.Column("effects", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("id"),
    )
    op.create_index("ix_effects_experiment_phase", "effects", ["experiment", "phase", "id"], unique=False)
    op.create_table(
        "early_outcomes",
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("request_id"),
    )
    phase_sums = op.create_table(
        "phase_sums",
        sa.Column("experiment", sa.String(length=32), nullable=False),
        sa.Column("phase", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("counts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("experiment", "phase"),
    )
    op.create_table(
        "arm_sums",
        sa.Column("experiment", sa.String(length=32), nullable=False),
        sa.Column("phase", sa.Integer(), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("quantity", sa.String(length=64), nullable=False),
        sa.Column("n", sa.BigInteger(), nullable=False),
        sa.Column("sums", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("experiment", "phase", "arm", "quantity"),
    )
    op.create_table(
        "unit_sums",
        sa.Column("experiment", sa.String(length=32), nullable=False),
        sa.Column("phase", sa.Integer(), nullable=False),
        sa.Column("unit", sa.String(length=32), nullable=False),
        sa.Column("arm", sa.String(length=64), nullable=False),
        sa.Column("sums", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("experiment", "phase", "unit", "arm"),
    )
    phases = sa.table("phases", sa.column("experiment"), sa.column("number"))
    stale = sa.select(phases.c.experiment, phases.c.number, sa.literal("stale"), sa.literal({}, sa.JSON()))
    op.execute(sa.insert(phase_sums).from_select(["experiment", "phase", "state", "counts"], stale))
