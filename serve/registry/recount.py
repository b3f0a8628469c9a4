"""Counting a phase anew from all of its rows: for those of an earlier release, to check the sums, and to mend them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict
from serve.experiments.definition import Plan
from serve.experiments.effects import PLAIN, Effects, UnitSums, Way, way_of
from serve.experiments.power_sums import PowerSums
from serve.experiments.totals import Place, Totals
from serve.registry.aggregates import (
    AT_ONCE,
    FORGOTTEN,
    READY,
    STALE,
    counts_json,
    early,
    ended_of,
    fold_into,
    in_chunks,
    locked,
    of_phase,
    read_totals,
    read_units,
    state_of,
    write_totals,
    write_units,
)
from serve.registry.database import Database
from serve.registry.experiment_tables import (
    ArmSumsRow,
    EarlyOutcomeRow,
    EffectRow,
    ExperimentRow,
    ExposureRow,
    FeedbackRow,
    OutcomeRow,
    TrialRow,
    UnitSumsRow,
)
from serve.registry.sole import RECOUNTING

LIMIT_S = 6 * 3600
"""One pass over all requests of a phase, sorted by unit."""
WRITTEN_AT_ONCE = 2000

Keep = Callable[[dict[Place, UnitSums]], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """Sums that are not what all rows add up to: ``what`` in words, as it is ``kept`` and as it was ``counted``."""

    what: str
    kept: object
    counted: object


class Recount:
    """One recount at a time for a database, in any process."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def check(self, experiment: str, phase: int) -> list[Difference]:
        """Where the sums differ from the rows, in one state of the database; both are whole numbers, so equal is equal.
        Holds nobody up. Raises Conflict for a phase whose rows were forgotten."""
        with self._database.reading(LIMIT_S) as session:
            _patient(session)
            _check_there(session, experiment, phase)
            kept = read_totals(session, experiment, phase)
            waiting = _all_waiting(session, experiment, phase)
            touched = read_units(session, experiment, phase, {unit for _, unit in waiting.units})
            after = fold_into(kept, waiting, touched)
            units = _Compared(session, experiment, phase, after)
            counted = _counted(session, experiment, phase, units.take)
            return [*units.differences(), *_differences(kept, counted)]

    def rebuild(self, experiment: str, phase: int) -> bool:
        """Make the sums anew; until then there are none to look at. False where another process is counting.

        Events go on being written meanwhile: the rows are read in one state of the database, and of the effects that
        wait those in that state go when the new sums come. Killed in between, it begins anew.
        Raises Conflict for a phase whose rows were forgotten.
        """
        with self._database.sole(RECOUNTING) as lock:
            if lock is None:
                return False
            with self._database.adding() as session:
                row = locked(session, experiment, phase)
                if row.state == FORGOTTEN:
                    raise _gone(experiment, phase)
                row.state, row.counts = STALE, {}
            for table in (UnitSumsRow, ArmSumsRow):
                self._clear(table, experiment, phase)
            with self._database.reading(LIMIT_S) as session:
                _patient(session)
                waiting = list(session.scalars(sa.select(EffectRow.id).where(*of_phase(EffectRow, experiment, phase))))
                known = list(early(session, experiment, phase))
                totals = _counted(session, experiment, phase, lambda units: self._write(experiment, phase, units))
            lock.check()
            with self._database.adding() as session:
                row = locked(session, experiment, phase)
                if row.state == FORGOTTEN:
                    raise _gone(experiment, phase)
                for some in in_chunks(waiting):
                    session.execute(sa.delete(EffectRow).where(EffectRow.id.in_(some)))
                for some in in_chunks(known):
                    session.execute(sa.delete(EarlyOutcomeRow).where(EarlyOutcomeRow.request_id.in_(some)))
                write_totals(session, row, totals, list(totals.sums))
                row.state = READY
            return True

    def _write(self, experiment: str, phase: int, units: dict[Place, UnitSums]) -> None:
        with self._database.adding() as session:
            write_units(session, experiment, phase, units)

    def _clear(self, table: type[UnitSumsRow] | type[ArmSumsRow], experiment: str, phase: int) -> None:
        keys = list(table.__table__.primary_key)
        some = sa.select(*keys).where(*of_phase(table, experiment, phase)).limit(WRITTEN_AT_ONCE)
        gone = sa.delete(table).where(sa.tuple_(*keys).in_(some)).returning(keys[0])
        while True:
            with self._database.adding() as session:
                if not session.execute(gone).all():
                    return


class _Compared:
    """Units' sums as they are kept, beside those that are counted."""

    def __init__(self, session: Session, experiment: str, phase: int, after: Mapping[Place, UnitSums]) -> None:
        self._session, self._phase, self._after = session, (experiment, phase), after
        self._counted = self._unlike = 0

    def take(self, counted: dict[Place, UnitSums]) -> None:
        kept = read_units(self._session, *self._phase, {unit for _, unit in counted}) | dict(self._after)
        self._counted += len(counted)
        self._unlike += sum(kept.get(place) != sums for place, sums in counted.items())

    def differences(self) -> Iterator[Difference]:
        wanted = sa.select(UnitSumsRow.unit, UnitSumsRow.arm).where(*of_phase(UnitSumsRow, *self._phase))
        stored = self._session.scalar(sa.select(sa.func.count()).select_from(wanted.subquery())) or 0
        new = {unit for _, unit in self._after}
        known = read_units(self._session, *self._phase, new)
        kept = stored + len(self._after.keys() - known.keys())
        if kept != self._counted:
            yield Difference(what="units", kept=kept, counted=self._counted)
        if self._unlike:
            yield Difference(what="units whose sums are others", kept=self._unlike, counted=0)


def _differences(kept: Totals, counted: Totals) -> Iterator[Difference]:
    ours, theirs = counts_json(kept), counts_json(counted)
    for name in ("exposed", "switched"):
        if ours[name] != theirs[name]:
            yield Difference(what=name, kept=ours[name], counted=theirs[name])
    if kept.asked != counted.asked:
        yield Difference(what="requests", kept=dict(kept.asked), counted=dict(counted.asked))
    for place in sorted({*kept.sums, *counted.sums}):
        pair = [found.sums.get(place, PowerSums()) for found in (kept, counted)]
        if pair[0] != pair[1]:
            yield Difference(what=f"{place[1]} of '{place[0]}'", kept=pair[0].moments(), counted=pair[1].moments())


def _counted(session: Session, experiment: str, phase: int, keep: Keep) -> Totals:
    """All rows of a phase added up, unit by unit; ``keep`` is given the units' sums, some at a time."""
    totals = Totals(ways=_ways(session, experiment))
    exposed = sa.select(ExposureRow.arm, sa.func.count()).where(*of_phase(ExposureRow, experiment, phase))
    totals.exposed.update(dict(session.execute(exposed.group_by(ExposureRow.arm)).tuples().all()))
    kinds = (TrialRow.arm, TrialRow.assignment, TrialRow.counts)
    asked = sa.select(*kinds, sa.func.count()).where(*of_phase(TrialRow, experiment, phase)).group_by(*kinds)
    totals.asked.update({(arm, kind, counts): number for arm, kind, counts, number in session.execute(asked)})
    units: dict[Place, UnitSums] = {}
    rows = session.execute(_rows(experiment, phase).execution_options(yield_per=10 * AT_ONCE))
    for _, of_unit in groupby(rows, key=lambda row: row.unit):
        effects = Effects()
        for row in of_unit:
            if row.metric is not None:
                effects.feedback(row, row.metric, totals.ways.get(row.metric, PLAIN), row.value)
                continue
            effects.trial(row)
            if row.status is not None:
                effects.outcome(row, ended_of(row))
        for (arm, _), sums in effects.units.items():
            totals.replace(arm, {}, sums)
        totals.switched += len(effects.units) > 1
        units |= effects.units
        if len(units) >= WRITTEN_AT_ONCE:
            keep(units)
            units = {}
    keep(units)
    return totals


def _rows(experiment: str, phase: int) -> Any:
    """Requests that count, with their outcomes, and reports, each with its request; a unit's one after another."""
    asked = (TrialRow.unit, TrialRow.arm, TrialRow.assignment, TrialRow.counts)
    ended = (OutcomeRow.status, OutcomeRow.is_cold, OutcomeRow.ln_first_s, OutcomeRow.ln_token_s)
    reported = (FeedbackRow.metric, FeedbackRow.value)

    def nothing(columns: tuple[Any, ...]) -> list[Any]:
        return [sa.cast(sa.null(), column.type).label(column.name) for column in columns]

    evident = (*of_phase(TrialRow, experiment, phase), TrialRow.counts.is_(True), TrialRow.unit.is_not(None))
    requests = (
        sa.select(*asked, *ended, *nothing(reported))
        .select_from(TrialRow)
        .join(OutcomeRow, OutcomeRow.request_id == TrialRow.request_id, isouter=True)
        .where(*evident)
    )
    reports = (
        sa.select(*asked, *nothing(ended), *reported)
        .join(FeedbackRow, FeedbackRow.request_id == TrialRow.request_id)
        .where(*evident)
    )
    both = sa.union_all(requests, reports).subquery()
    return sa.select(both).order_by(both.c.unit)


def _ways(session: Session, experiment: str) -> dict[str, Way]:
    plan = session.scalar(sa.select(ExperimentRow.plan).where(ExperimentRow.id == experiment))
    return {} if plan is None else {metric.name: way_of(metric) for metric in Plan.model_validate(plan).metrics}


def _all_waiting(session: Session, experiment: str, phase: int) -> Effects:
    effects = Effects()
    for found in session.scalars(sa.select(EffectRow.effects).where(*of_phase(EffectRow, experiment, phase))):
        effects.merge(Effects.of_json(found))
    for trial, ended in early(session, experiment, phase).values():
        effects.outcome(trial, ended)
    return effects


def _patient(session: Session) -> None:
    """Let a statement take its time; it holds nobody up."""
    if session.get_bind().dialect.name == "postgresql":
        session.execute(sa.text(f"SET LOCAL statement_timeout = '{LIMIT_S}s'"))


def _check_there(session: Session, experiment: str, phase: int) -> None:
    if state_of(session, experiment, phase) == FORGOTTEN:
        raise _gone(experiment, phase)


def _gone(experiment: str, phase: int) -> Conflict:
    return Conflict(f"The rows of phase {phase} of {experiment} were forgotten; its sums are all that is left of them.")
