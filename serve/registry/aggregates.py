"""Sums of experiments, kept up as events come.

An event and its effect (``effects``) are written in one transaction, without a lock that writers share. Whoever looks
folds first: takes effects of a phase away and puts what follows into the sums of its units, arms and the phase, a
bounded number at a time, each time in one transaction under the lock of the phase's row. So each effect is added once,
whatever is killed in between, and a look costs what came since the last one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.orm import Session

from serve.experiments.effects import Effects, Ended, UnitSums, Way
from serve.experiments.power_sums import PowerSums
from serve.experiments.totals import Place, Totals
from serve.registry.database import Database
from serve.registry.errors import RegistryCounting
from serve.registry.experiment_tables import (
    ArmSumsRow,
    EarlyOutcomeRow,
    EffectRow,
    OutcomeRow,
    PhaseSumsRow,
    TrialRow,
    UnitSumsRow,
)
from serve.registry.inserting import insert_into, upsert

READY, STALE, FORGOTTEN = "ready", "stale", "forgotten"
FOLDED_AT_ONCE = 2000
"""Of ``size``: a tenth of a second, for which SQLite's other writers wait."""
AT_ONCE = 500
"""Values in one query."""
EARLY_FOR = timedelta(days=1)
"""After that, the request of an outcome was lost with its gateway."""
COUNTING_RETRY_S = 10

Phase = tuple[str, int]


class Aggregates:
    """Sums of phases, by experiment and number."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def totals(self, experiment: str, phase: int) -> Totals:
        """What a phase adds up to, with all that was written before. Raises RegistryCounting."""
        self.fold(experiment, phase)
        with self._database.reading() as session:
            return read_totals(session, experiment, phase)

    def fold(self, experiment: str, phase: int) -> None:
        """Add up what waits. Raises RegistryCounting while the phase is counted anew."""
        with self._database.reading() as session:
            if state_of(session, experiment, phase) == STALE:
                raise RegistryCounting(
                    "The requests of this experiment are being counted anew, which takes some minutes for ten "
                    "million of them. Try again shortly.",
                    retry_after_s=COUNTING_RETRY_S,
                )
            is_behind = session.scalar(sa.select(_waiting(experiment, phase).exists())) or early(
                session, experiment, phase
            )
        while is_behind:
            with self._database.adding() as session:
                is_behind = _fold_some(session, experiment, phase)

    def keep_up(self) -> None:
        """Add up what waits of any phase, also of those that nobody looks at."""
        with self._database.adding() as session:
            lost = sa.delete(EarlyOutcomeRow).where(EarlyOutcomeRow.at < datetime.now(UTC) - EARLY_FOR)
            session.execute(lost)
        waiting = sa.select(EffectRow.experiment, EffectRow.phase).distinct()
        with self._database.reading() as session:
            behind = session.execute(waiting).all()
            stale = set(phases_in(session, STALE))
        for experiment, phase in behind:
            if (experiment, phase) not in stale:
                self.fold(experiment, phase)

    def stale(self) -> list[Phase]:
        """Phases that have to be counted anew."""
        with self._database.reading() as session:
            return phases_in(session, STALE)


def note_effects(session: Session, effects: Mapping[Phase, Effects]) -> None:
    """Let effects wait to be added up; they are written with what they are of, or not at all."""
    rows = [
        {"experiment": experiment, "phase": phase, "size": found.size, "effects": found.to_json()}
        for (experiment, phase), found in effects.items()
        if found.size
    ]
    if rows:
        session.execute(sa.insert(EffectRow.__table__), rows)  # type: ignore[arg-type]  # a Table


def note_early(session: Session, request_ids: Iterable[str]) -> None:
    """Let outcomes wait for their requests."""
    rows = [{"request_id": request_id, "at": datetime.now(UTC)} for request_id in request_ids]
    if rows:
        session.execute(insert_into(session, EarlyOutcomeRow).on_conflict_do_nothing(), rows)


def phases_in(session: Session, state: str) -> list[Phase]:
    wanted = sa.select(PhaseSumsRow.experiment, PhaseSumsRow.phase).where(PhaseSumsRow.state == state)
    return [(experiment, phase) for experiment, phase in session.execute(wanted)]


def state_of(session: Session, experiment: str, phase: int) -> str | None:
    row = session.get(PhaseSumsRow, (experiment, phase))
    return None if row is None else row.state


def locked(session: Session, experiment: str, phase: int) -> PhaseSumsRow:
    """The phase's row, which this transaction alone may change from here on; made if there is none."""
    wanted = sa.select(PhaseSumsRow).where(PhaseSumsRow.experiment == experiment, PhaseSumsRow.phase == phase)
    if (row := session.scalars(wanted.with_for_update()).first()) is None:
        new = {"experiment": experiment, "phase": phase, "state": READY, "counts": counts_json(Totals())}
        session.execute(insert_into(session, PhaseSumsRow).on_conflict_do_nothing(), [new])
        row = session.scalars(wanted.with_for_update()).one()
    return row


def read_totals(session: Session, experiment: str, phase: int) -> Totals:
    """The sums as they are, without what waits."""
    row = session.get(PhaseSumsRow, (experiment, phase))
    if row is None or not row.counts:
        return Totals()
    counts = row.counts
    totals = Totals(
        exposed=Counter(counts["exposed"]),
        asked=Counter({(arm, kind, does_count): number for arm, kind, does_count, number in counts["asked"]}),
        switched=counts["switched"],
        ways={metric: Way(*way) for metric, way in counts["ways"].items()},
    )
    wanted = sa.select(ArmSumsRow.arm, ArmSumsRow.quantity, ArmSumsRow.n, ArmSumsRow.sums)
    for arm, quantity, n, sums in session.execute(wanted.where(*of_phase(ArmSumsRow, experiment, phase))):
        totals.sums[arm, quantity] = PowerSums(n=n, sums=sums)
    return totals


def write_totals(session: Session, row: PhaseSumsRow, totals: Totals, changed: Iterable[Place]) -> None:
    """Write down the counts, and the ``changed`` of the sums."""
    row.counts = counts_json(totals)
    of = {"experiment": row.experiment, "phase": row.phase}
    upsert(
        session,
        ArmSumsRow,
        [
            {**of, "arm": arm, "quantity": quantity, "n": sums.n, "sums": sums.sums}
            for arm, quantity in changed
            for sums in (totals.sums[arm, quantity],)
        ],
    )


def counts_json(totals: Totals) -> dict[str, Any]:
    return {
        "exposed": dict(totals.exposed),
        "asked": [[*asked, number] for asked, number in totals.asked.items()],
        "switched": totals.switched,
        "ways": totals.ways,
    }


def read_units(session: Session, experiment: str, phase: int, units: Iterable[str]) -> dict[Place, UnitSums]:
    """The sums of ``units`` in every arm that they were seen in."""
    of = _of_units_postgres if session.get_bind().dialect.name == "postgresql" else _of_units
    return {
        (arm, unit): sums
        for some in in_chunks(sorted(set(units)))
        for arm, unit, sums in session.execute(of(experiment, phase, some))
    }


def _of_units(experiment: str, phase: int, units: list[str]) -> Any:
    wanted = sa.select(UnitSumsRow.arm, UnitSumsRow.unit, UnitSumsRow.sums)
    return wanted.where(*of_phase(UnitSumsRow, experiment, phase), UnitSumsRow.unit.in_(units))


def _of_units_postgres(experiment: str, phase: int, units: list[str]) -> Any:
    """One after another by the whole key: of an experiment that it does not know yet, PostgreSQL expects few units and
    would read them all to pick those of a list."""
    asked = sa.func.unnest(sa.literal(units, ARRAY(sa.String))).table_valued("unit").render_derived(name="asked")
    wanted = sa.select(UnitSumsRow.arm, UnitSumsRow.unit, UnitSumsRow.sums)
    mine = wanted.where(*of_phase(UnitSumsRow, experiment, phase), UnitSumsRow.unit == asked.c.unit)
    # The limit, which nothing reaches, keeps it from being joined in another way.
    found = mine.limit(AT_ONCE).lateral("found")
    return sa.select(found.c.arm, found.c.unit, found.c.sums).select_from(asked).join(found, sa.true())


def write_units(session: Session, experiment: str, phase: int, units: Mapping[Place, UnitSums]) -> None:
    of = {"experiment": experiment, "phase": phase}
    upsert(session, UnitSumsRow, [{**of, "arm": a, "unit": unit, "sums": sums} for (a, unit), sums in units.items()])


def fold_into(totals: Totals, effects: Effects, before: Mapping[Place, UnitSums]) -> dict[Place, UnitSums]:
    """What the units' sums are with ``effects``, which ``totals`` take in. ``before``: of those units in all arms."""
    return totals.fold(effects, before, Counter(unit for _, unit in before))


def early(session: Session, experiment: str, phase: int) -> dict[str, tuple[Any, Ended]]:
    """Outcomes that came before their request and whose request, of this phase, is known by now, by its id."""
    wanted = (
        sa.select(TrialRow, OutcomeRow)
        .join(OutcomeRow, OutcomeRow.request_id == TrialRow.request_id)
        .where(*of_phase(TrialRow, experiment, phase))
    )
    # By key: a database that has not looked at its tables lately might join all requests.
    return {
        trial.request_id: (trial, ended_of(outcome))
        for some in in_chunks(session.scalars(sa.select(EarlyOutcomeRow.request_id)).all())
        for trial, outcome in session.execute(wanted.where(TrialRow.request_id.in_(some)))
    }


def ended_of(outcome: Any) -> Ended:
    return Ended(outcome.status, outcome.is_cold, outcome.ln_first_s, outcome.ln_token_s)


def of_phase(table: Any, experiment: str, phase: int) -> tuple[Any, ...]:
    return table.experiment == experiment, table.phase == phase


def in_chunks(values: Iterable[Any], size: int = AT_ONCE) -> Iterator[list[Any]]:
    rest = iter(values)
    while some := list(islice(rest, size)):
        yield some


def _waiting(experiment: str, phase: int) -> Any:
    return sa.select(EffectRow.id, EffectRow.size).where(*of_phase(EffectRow, experiment, phase))


def _fold_some(session: Session, experiment: str, phase: int) -> bool:
    """Add up some of what waits; whether more does."""
    row = locked(session, experiment, phase)
    if row.state == STALE:
        return False
    effects, has_more = _taken(session, experiment, phase)
    if row.state == FORGOTTEN:
        return has_more
    totals = read_totals(session, experiment, phase)
    before = {place: (sums.n, sums.sums) for place, sums in totals.sums.items()}
    units = {unit for _, unit in effects.units}
    write_units(session, experiment, phase, fold_into(totals, effects, read_units(session, experiment, phase, units)))
    changed = [place for place, sums in totals.sums.items() if before.get(place) != (sums.n, sums.sums)]
    write_totals(session, row, totals, changed)
    return has_more


def _taken(session: Session, experiment: str, phase: int) -> tuple[Effects, bool]:
    """Take some of the effects that wait; whether there are more."""
    waiting = session.execute(_waiting(experiment, phase).order_by(EffectRow.id).limit(FOLDED_AT_ONCE)).all()
    ids: list[int] = []
    size = 0
    for number, its_size in waiting:
        if ids and size + its_size > FOLDED_AT_ONCE:
            break
        ids.append(number)
        size += its_size
    effects = Effects()
    for some in in_chunks(ids):
        gone = sa.delete(EffectRow).where(EffectRow.id.in_(some)).returning(EffectRow.effects)
        for found in session.scalars(gone):
            effects.merge(Effects.of_json(found))
    known = early(session, experiment, phase)
    for some in in_chunks(known):
        gone = (
            sa.delete(EarlyOutcomeRow).where(EarlyOutcomeRow.request_id.in_(some)).returning(EarlyOutcomeRow.request_id)
        )
        for request_id in session.scalars(gone):
            effects.outcome(*known[request_id])
    return effects, len(ids) < len(waiting) or len(waiting) == FOLDED_AT_ONCE
