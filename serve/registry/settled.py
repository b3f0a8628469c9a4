"""Results that stay as they are: of each phase, the first that were settled, and those that it was decided on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa

from serve.registry.database import Database
from serve.registry.experiment_tables import SettledRow
from serve.registry.inserting import insert_into


class SettledResults:
    """Written once for each phase and ground, whoever comes first."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, experiment: str, phase: int) -> Mapping[str, Any] | None:
        """What was decided on, or else what a complete fixed analysis said."""
        wanted = sa.select(SettledRow).where(SettledRow.experiment == experiment, SettledRow.phase == phase)
        with self._database.reading() as session:
            found = {row.ground: dict(row.results) for row in session.scalars(wanted)}
        return found.get("decided", found.get("complete"))

    def settle(self, experiment: str, phase: int, ground: str, results: Mapping[str, Any]) -> None:
        """Keep ``results``, unless some are kept on this ground already."""
        row = {"experiment": experiment, "phase": phase, "ground": ground, "results": dict(results)}
        with self._database.adding() as session:
            session.execute(insert_into(session, SettledRow).on_conflict_do_nothing(), [row])
