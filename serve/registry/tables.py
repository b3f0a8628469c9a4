"""Tables of the registry. Their history is in ``migrations/``; a test holds the two against each other."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import JSON, BigInteger, DateTime, ForeignKey, ForeignKeyConstraint, Integer, String, UniqueConstraint
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAME_LENGTH = 128
VERSION_LENGTH = 64


class Table(DeclarativeBase):
    """Base of all tables."""


class AdapterRow(Table):
    """A name that versions are registered under."""

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    versions: Mapped[list[VersionRow]] = relationship(
        order_by="VersionRow.number", cascade="all, delete-orphan", passive_deletes=True
    )
    aliases: Mapped[list[AliasRow]] = relationship(
        order_by="AliasRow.name", cascade="all, delete-orphan", passive_deletes=True
    )


class VersionRow(Table):
    """Content of an adapter, by its fingerprint; only where it lies may change. ``info``: what examination found."""

    __tablename__ = "versions"
    __table_args__ = (UniqueConstraint("adapter", "number", name="uq_versions_adapter_number"),)

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    id: Mapped[str] = mapped_column(String(VERSION_LENGTH), primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
    path: Mapped[str] = mapped_column(String(4096))
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    info: Mapped[dict[str, Any]] = mapped_column(JSON)


class AliasRow(Table):
    """A movable name of one version of an adapter."""

    __tablename__ = "aliases"
    __table_args__ = (
        # Without an action: a version that an alias names cannot be deleted under it.
        ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"], name="fk_aliases_version"),
    )

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    version: Mapped[str] = mapped_column(String(VERSION_LENGTH))
    moved_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class AuditRow(Table):
    """One change of the registry. Rows are only ever added."""

    __tablename__ = "audit"

    id: Mapped[int] = mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)
    at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    actor: Mapped[str] = mapped_column(String(NAME_LENGTH))
    action: Mapped[str] = mapped_column(String(64))
    subject: Mapped[str] = mapped_column(String(2 * NAME_LENGTH))
    details: Mapped[dict[str, Any]] = mapped_column(JSON)


class RevisionRow(Table):
    """One row whose number grows with every change: readers poll it instead of the tables."""

    __tablename__ = "revision"

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    number: Mapped[int] = mapped_column(Integer)
