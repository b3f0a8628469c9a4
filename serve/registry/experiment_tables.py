"""Tables of model aliases and experiments: what was said, what is going on, and what was seen.

What is said changes under the registry's lock and moves its revision. What is seen (exposures, requests, outcomes,
feedback, pairs of answers) is only ever added to.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    String,
    Text,
    UniqueConstraint,
)
from sqlalchemy.orm import Mapped, mapped_column

from serve.registry.tables import NAME_LENGTH, VERSION_LENGTH, Table

ID_LENGTH = 32
ARM_LENGTH = 64
TARGET_LENGTH = 4096
REQUEST_LENGTH = 128
KEY_LENGTH = 255


class ModelAliasRow(Table):
    """A model name, and what it means, spelled exactly."""

    __tablename__ = "model_aliases"

    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    target: Mapped[str] = mapped_column(String(TARGET_LENGTH))
    moved_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class UseRow(Table):
    """A version that an alias or an experiment (``owner``) means, and that cannot be deleted under it."""

    __tablename__ = "uses"
    __table_args__ = (
        ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"], name="fk_uses_version"),
    )

    owner: Mapped[str] = mapped_column(String(NAME_LENGTH + 16), primary_key=True)
    adapter: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    version: Mapped[str] = mapped_column(String(VERSION_LENGTH), primary_key=True)


class ExperimentRow(Table):
    """An experiment; ``looked_at``: when a gateway last took it on itself to look at its results."""

    __tablename__ = "experiments"

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(String(ARM_LENGTH), unique=True)
    alias: Mapped[str] = mapped_column(String(NAME_LENGTH), index=True)
    state: Mapped[str] = mapped_column(String(16))
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    layer: Mapped[str | None] = mapped_column(String(ARM_LENGTH))
    layer_start: Mapped[float | None] = mapped_column(Float)
    layer_end: Mapped[float | None] = mapped_column(Float)
    resumes_to: Mapped[str | None] = mapped_column(String(16))
    winner: Mapped[str | None] = mapped_column(String(ARM_LENGTH))
    replaced: Mapped[str | None] = mapped_column(String(TARGET_LENGTH))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    since: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    looked_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class PhaseRow(Table):
    """A phase of an experiment."""

    __tablename__ = "phases"

    experiment: Mapped[str] = mapped_column(ForeignKey("experiments.id", ondelete="CASCADE"), primary_key=True)
    number: Mapped[int] = mapped_column(Integer, primary_key=True)
    drawn: Mapped[int] = mapped_column(Integer)
    allocation: Mapped[dict[str, Any]] = mapped_column(JSON)
    coverage: Mapped[float] = mapped_column(Float)
    opened_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    closed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class ExposureRow(Table):
    """A unit's first request in a phase; one row for each unit."""

    __tablename__ = "exposures"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    unit: Mapped[str] = mapped_column(String(32), primary_key=True)
    arm: Mapped[str] = mapped_column(String(ARM_LENGTH))
    request_id: Mapped[str] = mapped_column(String(REQUEST_LENGTH))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class TrialRow(Table):
    """A request that an experiment answered, when its answer began. ``counts``: whether it is evidence."""

    __tablename__ = "trials"
    __table_args__ = (Index("ix_trials_experiment_phase", "experiment", "phase"),)

    request_id: Mapped[str] = mapped_column(String(REQUEST_LENGTH), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(ID_LENGTH))
    phase: Mapped[int] = mapped_column(Integer)
    arm: Mapped[str | None] = mapped_column(String(ARM_LENGTH))
    unit: Mapped[str | None] = mapped_column(String(32))
    assignment: Mapped[str] = mapped_column(String(16))
    counts: Mapped[bool] = mapped_column(Boolean)
    owner: Mapped[str] = mapped_column(String(12))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class OutcomeRow(Table):
    """How such a request ended. Times are natural logarithms of seconds, since their means are what is compared."""

    __tablename__ = "outcomes"

    request_id: Mapped[str] = mapped_column(String(REQUEST_LENGTH), primary_key=True)
    status: Mapped[int] = mapped_column(Integer)
    is_cold: Mapped[bool] = mapped_column(Boolean)
    ln_first_s: Mapped[float | None] = mapped_column(Float)
    ln_token_s: Mapped[float | None] = mapped_column(Float)
    prompt_tokens: Mapped[int] = mapped_column(Integer)
    completion_tokens: Mapped[int] = mapped_column(Integer)


class FeedbackRow(Table):
    """A value that was reported of a request; ``key`` tells repeated reports from further ones."""

    __tablename__ = "feedback"
    __table_args__ = (UniqueConstraint("request_id", "metric", "key", name="uq_feedback_request_metric_key"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    request_id: Mapped[str] = mapped_column(ForeignKey("trials.request_id"))
    metric: Mapped[str] = mapped_column(String(ARM_LENGTH))
    key: Mapped[str] = mapped_column(String(KEY_LENGTH))
    value: Mapped[float] = mapped_column(Float)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class EffectRow(Table):
    """What a batch of events, or one report, does to its phase's sums: written with them, and taken away when it is
    added up. ``size``: about how much work that is."""

    __tablename__ = "effects"
    __table_args__ = (Index("ix_effects_experiment_phase", "experiment", "phase", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(ID_LENGTH))
    phase: Mapped[int] = mapped_column(Integer)
    size: Mapped[int] = mapped_column(Integer)
    effects: Mapped[dict[str, Any]] = mapped_column(JSON)


class EarlyOutcomeRow(Table):
    """An outcome that was written before its request, and is added up when that is known."""

    __tablename__ = "early_outcomes"

    request_id: Mapped[str] = mapped_column(String(REQUEST_LENGTH), primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class PhaseSumsRow(Table):
    """What a phase adds up to beside its metrics; its row lock is held by whoever adds up. ``state``: ``ready``,
    ``stale`` (to be counted anew from all rows) or ``forgotten`` (those rows are gone, the sums stay)."""

    __tablename__ = "phase_sums"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    counts: Mapped[dict[str, Any]] = mapped_column(JSON)


class ArmSumsRow(Table):
    """Power sums over the ``n`` units of an arm that have a quantity, as whole numbers."""

    __tablename__ = "arm_sums"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    arm: Mapped[str] = mapped_column(String(ARM_LENGTH), primary_key=True)
    quantity: Mapped[str] = mapped_column(String(ARM_LENGTH), primary_key=True)
    n: Mapped[int] = mapped_column(BigInteger)
    sums: Mapped[list[int]] = mapped_column(JSON)


class UnitSumsRow(Table):
    """A unit's own sums in an arm, by quantity."""

    __tablename__ = "unit_sums"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    unit: Mapped[str] = mapped_column(String(32), primary_key=True)
    arm: Mapped[str] = mapped_column(String(ARM_LENGTH), primary_key=True)
    sums: Mapped[dict[str, list[int]]] = mapped_column(JSON)


class LookRow(Table):
    """Results as they were at a time."""

    __tablename__ = "looks"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True), primary_key=True)
    results: Mapped[dict[str, Any]] = mapped_column(JSON)


class SettledRow(Table):
    """Results of a phase that stay as they are. ``ground``: ``complete`` or ``decided``."""

    __tablename__ = "settled_results"

    experiment: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    phase: Mapped[int] = mapped_column(Integer, primary_key=True)
    ground: Mapped[str] = mapped_column(String(16), primary_key=True)
    results: Mapped[dict[str, Any]] = mapped_column(JSON)


class PairRow(Table):
    """What a user was answered, and what a shadow arm would have answered."""

    __tablename__ = "pairs"
    __table_args__ = (Index("ix_pairs_experiment", "experiment", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    experiment: Mapped[str] = mapped_column(String(ID_LENGTH))
    phase: Mapped[int] = mapped_column(Integer)
    request_id: Mapped[str] = mapped_column(String(REQUEST_LENGTH))
    served: Mapped[str] = mapped_column(String(ARM_LENGTH))
    shadow: Mapped[str] = mapped_column(String(ARM_LENGTH))
    prompt: Mapped[str | None] = mapped_column(Text)
    answer: Mapped[str] = mapped_column(Text)
    shadow_answer: Mapped[str] = mapped_column(Text)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
