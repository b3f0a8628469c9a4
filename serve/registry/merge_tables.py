"""Tables of merge jobs: what was asked, how far it is, and the checkpoints that came of it."""

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
    Index,
    Integer,
    String,
    Text,
    false,
)
from sqlalchemy.orm import Mapped, mapped_column

from serve.registry.tables import NAME_LENGTH, VERSION_LENGTH, Table

ID_LENGTH = 32
UNIT_LENGTH = 255


class MergeRow(Table):
    """A job. ``owner`` may work on it until ``leased_until``; ``fence`` grows with every owner, and one whose fence is
    old changes nothing any more. ``plan_id`` is the plan's. ``target``: a folder, or empty for the registry."""

    __tablename__ = "merges"
    __table_args__ = (Index("ix_merges_open", "state", "created_at"),)

    id: Mapped[str] = mapped_column(String(ID_LENGTH), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH))
    target: Mapped[str] = mapped_column(String(4096), server_default="")
    state: Mapped[str] = mapped_column(String(16))
    plan: Mapped[dict[str, Any]] = mapped_column(JSON)
    plan_id: Mapped[str] = mapped_column(String(VERSION_LENGTH))
    actor: Mapped[str] = mapped_column(String(NAME_LENGTH))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    started_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    ended_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    trials: Mapped[list[Any]] = mapped_column(JSON, default=list)
    report: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))
    error: Mapped[str | None] = mapped_column(Text)
    is_cancelled: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)
    owner: Mapped[str] = mapped_column(String(64), server_default="", default="")
    fence: Mapped[int] = mapped_column(Integer, server_default="0", default=0)
    leased_until: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class MergeUnitRow(Table):
    """One task's work in a job. ``peak_bytes``: the most memory its process had."""

    __tablename__ = "merge_units"

    job: Mapped[str] = mapped_column(ForeignKey("merges.id", ondelete="CASCADE"), primary_key=True)
    unit: Mapped[str] = mapped_column(String(UNIT_LENGTH), primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    kind: Mapped[str] = mapped_column(String(16))
    state: Mapped[str] = mapped_column(String(16))
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    done_bytes: Mapped[int] = mapped_column(BigInteger, server_default="0", default=0)
    node: Mapped[str] = mapped_column(String(64), server_default="", default="")
    seconds: Mapped[float | None] = mapped_column(Float)
    peak_bytes: Mapped[int | None] = mapped_column(BigInteger)


class MergeLogRow(Table):
    """One line of what happened to a job."""

    __tablename__ = "merge_logs"
    __table_args__ = (Index("ix_merge_logs_job", "job", "id"),)

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    job: Mapped[str] = mapped_column(ForeignKey("merges.id", ondelete="CASCADE"))
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    level: Mapped[str] = mapped_column(String(16))
    message: Mapped[str] = mapped_column(Text)


class CheckpointRow(Table):
    """A merged base. ``version``: sha256 of its manifest's content; ``parents``: versions of what went in, by name."""

    __tablename__ = "checkpoints"

    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    version: Mapped[str] = mapped_column(String(VERSION_LENGTH))
    location: Mapped[str] = mapped_column(String(4096))
    base: Mapped[str] = mapped_column(String(4096))
    job: Mapped[str] = mapped_column(ForeignKey("merges.id"))
    parents: Mapped[dict[str, str]] = mapped_column(JSON)
    num_bytes: Mapped[int] = mapped_column(BigInteger)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
