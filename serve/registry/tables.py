"""Tables of the registry. Their history is in ``migrations/``; a test holds the two against each other."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    DateTime,
    ForeignKey,
    ForeignKeyConstraint,
    Integer,
    LargeBinary,
    String,
    UniqueConstraint,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, relationship

NAME_LENGTH = 128
VERSION_LENGTH = 64


class Table(DeclarativeBase):
    """Base of all tables."""


class AdapterRow(Table):
    """A name that versions are registered under. ``revision``: the registry's, when anything of it changed last."""

    __tablename__ = "adapters"

    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    revision: Mapped[int] = mapped_column(Integer, server_default="0", default=0)
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
    source: Mapped[str] = mapped_column(String(4096), server_default="")
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    info: Mapped[dict[str, Any]] = mapped_column(JSON)


class AliasRow(Table):
    """A movable name of one version of an adapter; ``is_pinned``: engines keep what it names in a slot."""

    __tablename__ = "aliases"
    __table_args__ = (
        # Without an action: a version that an alias names cannot be deleted under it.
        ForeignKeyConstraint(["adapter", "version"], ["versions.adapter", "versions.id"], name="fk_aliases_version"),
    )

    adapter: Mapped[str] = mapped_column(ForeignKey("adapters.name", ondelete="CASCADE"), primary_key=True)
    name: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    version: Mapped[str] = mapped_column(String(VERSION_LENGTH))
    moved_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    is_pinned: Mapped[bool] = mapped_column(Boolean, server_default=false(), default=False)


class HoldRow(Table):
    """A version that someone other than an adapter needs: a job, a tool. It ends at ``expires_at``."""

    __tablename__ = "holds"

    version: Mapped[str] = mapped_column(String(VERSION_LENGTH), primary_key=True)
    holder: Mapped[str] = mapped_column(String(NAME_LENGTH), primary_key=True)
    expires_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))


class GarbageRow(Table):
    """A version that the store has and nobody names, since it was first seen so. ``claimed_at``: since when it is being
    deleted, NULL while it is not."""

    __tablename__ = "garbage"

    version: Mapped[str] = mapped_column(String(VERSION_LENGTH), primary_key=True)
    seen_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    claimed_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class ApiKeyRow(Table):
    """An API key; the key itself is nowhere. ``adapters``: patterns of names, NULL for all."""

    __tablename__ = "api_keys"

    id: Mapped[str] = mapped_column(String(12), primary_key=True)
    name: Mapped[str] = mapped_column(String(64))
    digest: Mapped[str] = mapped_column(String(64))
    scopes: Mapped[list[str]] = mapped_column(JSON)
    adapters: Mapped[list[str] | None] = mapped_column(JSON(none_as_null=True))
    requests_per_minute: Mapped[int | None] = mapped_column(Integer)
    max_concurrent: Mapped[int | None] = mapped_column(Integer)
    created_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    expires_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))
    revoked_at: Mapped[datetime | None] = mapped_column(DateTime(timezone=True))


class IdempotencyRow(Table):
    """What a request with an idempotency key answered; ``status`` is NULL while it runs."""

    __tablename__ = "idempotency"

    owner: Mapped[str] = mapped_column(String(12), primary_key=True)
    key: Mapped[str] = mapped_column(String(255), primary_key=True)
    request: Mapped[str] = mapped_column(String(64))
    begun_at: Mapped[datetime] = mapped_column(DateTime(timezone=True))
    status: Mapped[int | None] = mapped_column(Integer)
    content_type: Mapped[str] = mapped_column(String(128), server_default="")
    body: Mapped[bytes] = mapped_column(LargeBinary, server_default="")


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
