"""Inserts that can leave out, or replace, what is there; each database spells them in its own way."""

from __future__ import annotations

from typing import Any

from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from serve.registry.tables import Table


def insert_into(session: Session, table: type[Table]) -> Any:
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    return (sqlite.insert if is_sqlite else postgresql.insert)(table.__table__)  # type: ignore[arg-type]  # a Table


def upsert(session: Session, table: type[Table], rows: list[dict[str, Any]]) -> None:
    """Add ``rows``, in the place of those that have their keys."""
    if not rows:
        return
    insert = insert_into(session, table)
    keys = [column.name for column in table.__table__.primary_key]
    replaced = {name: insert.excluded[name] for name in rows[0] if name not in keys}
    # What returns something goes as a few statements of many rows.
    whole = insert.on_conflict_do_update(index_elements=keys, set_=replaced).returning(table.__table__.c[keys[0]])
    session.execute(whole, rows)
