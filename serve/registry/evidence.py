"""What was seen of one phase, as the analysis takes it, and the looks at it that are kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import sqlalchemy as sa

from serve.experiments.definition import Plan
from serve.experiments.evidence import Evidence
from serve.registry.aggregates import Aggregates
from serve.registry.database import Database
from serve.registry.experiment_tables import LookRow
from serve.registry.inserting import upsert
from serve.registry.recount import Recount
from serve.registry.repository import aware
from serve.registry.settled import SettledResults

KEPT_LOOKS = 400


@dataclass(frozen=True, slots=True)
class Look:
    at: datetime
    results: Mapping[str, Any]


class EvidenceReader:
    """Reads, and adds up what came since it read last; the looks that it keeps are results, for the pictures of how
    they came."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.settled = SettledResults(database)
        self._aggregates = Aggregates(database)
        self._recount = Recount(database)

    def of(self, experiment: str, phase: int, plan: Plan) -> Evidence:
        """Everything that the analysis of a phase needs, of all that was written before. Raises RegistryCounting."""
        return self._aggregates.totals(experiment, phase).evidence(plan)

    def keep_up(self) -> None:
        """Count the phases of an earlier release, and add up what waits of any. Takes long where there is much."""
        for experiment, phase in self._aggregates.stale():
            self._recount.rebuild(experiment, phase)
        self._aggregates.keep_up()

    def keep(self, experiment: str, phase: int, at: datetime, results: Mapping[str, Any]) -> None:
        """Remember results as they were; every second of the oldest goes when there are many."""
        with self._database.adding() as session:
            # Settled results come again with the time they were settled at.
            upsert(session, LookRow, [{"experiment": experiment, "phase": phase, "at": at, "results": dict(results)}])
            mine = sa.and_(LookRow.experiment == experiment, LookRow.phase == phase)
            times = list(session.scalars(sa.select(LookRow.at).where(mine).order_by(LookRow.at)))
            if len(times) > KEPT_LOOKS:
                thinned = times[1 : len(times) // 2 : 2]
                session.execute(sa.delete(LookRow).where(mine, LookRow.at.in_(thinned)))

    def last_look(self, experiment: str, phase: int) -> Look | None:
        mine = sa.select(LookRow).where(LookRow.experiment == experiment, LookRow.phase == phase)
        with self._database.reading() as session:
            row = session.scalars(mine.order_by(LookRow.at.desc()).limit(1)).first()
            return None if row is None else Look(aware(row.at), dict(row.results))

    def lowest_p(self, experiment: str, phase: int) -> float:
        """The smallest p-value of the shares at any look so far: each look carries the smallest before it."""
        last = self.last_look(experiment, phase)
        return 1.0 if last is None else float(last.results["shares"]["p_value"])

    def looks(self, experiment: str, phase: int) -> list[Look]:
        """Oldest first."""
        wanted = sa.select(LookRow).where(LookRow.experiment == experiment, LookRow.phase == phase)
        with self._database.reading() as session:
            return [Look(aware(row.at), dict(row.results)) for row in session.scalars(wanted.order_by(LookRow.at))]
