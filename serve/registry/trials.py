"""What was seen of experiments, written down: exposures, trials, outcomes, pairs of answers, and feedback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict, InvalidRequest, NotFound
from serve.experiments.assignment import Kind
from serve.experiments.definition import Metric, Plan
from serve.experiments.effects import Effects, way_of
from serve.experiments.events import Event, Exposure, Outcome, Pair, Trial
from serve.experiments.records import State
from serve.registry.aggregates import FORGOTTEN, Phase, ended_of, in_chunks, note_early, note_effects
from serve.registry.database import Database
from serve.registry.experiment_tables import (
    EffectRow,
    ExperimentRow,
    ExposureRow,
    FeedbackRow,
    OutcomeRow,
    PairRow,
    PhaseSumsRow,
    TrialRow,
    UnitSumsRow,
)
from serve.registry.inserting import insert_into
from serve.registry.repository import aware
from serve.registry.tables import Table

Seen = ExposureRow | PairRow | UnitSumsRow | EffectRow
FORGOTTEN_AT_ONCE = 500
MAX_VALUE = 1e9
"""Of feedback; sums of squares of more would not be exact enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Noted:
    """Feedback that is kept. ``counts``: whether it is evidence. ``is_repeated``: it was kept before."""

    experiment: str
    counts: bool
    is_repeated: bool


class Trials:
    """Rows are only ever added; what is there already is left as it is."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def add(self, events: Iterable[Event]) -> None:
        """Write down what was seen, with what that changes about the sums, all or nothing. Of a unit's exposures in a
        phase, the first one stays."""
        rows: dict[type[Event], list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            rows[type(event)].append(_values(event))
        effects: dict[Phase, Effects] = defaultdict(Effects)
        with self._database.adding() as session:
            for exposure in _added(session, ExposureRow, rows[Exposure]):
                effects[exposure.experiment, exposure.phase].exposure(exposure.arm)
            trials = {trial.request_id: trial for trial in _added(session, TrialRow, rows[Trial])}
            for trial in trials.values():
                effects[trial.experiment, trial.phase].trial(trial)
            outcomes = {outcome.request_id: outcome for outcome in _added(session, OutcomeRow, rows[Outcome])}
            trials |= _trials(session, outcomes.keys() - trials.keys())
            for trial in (trials[request_id] for request_id in outcomes.keys() & trials.keys()):
                ended = ended_of(outcomes[trial.request_id])
                effects[trial.experiment, trial.phase].outcome(trial, ended)
            note_early(session, sorted(outcomes.keys() - trials.keys()))
            if rows[Pair]:
                session.execute(insert_into(session, PairRow).on_conflict_do_nothing(), rows[Pair])
            note_effects(session, effects)

    def feedback(
        self,
        request_id: str,
        metric: str,
        value: bool | float,
        *,
        key: str,
        owner: str,
        may_any: bool = False,
        reaches: Callable[[str], bool] = lambda alias: True,
        is_last_try: bool = True,
    ) -> Noted | None:
        """Keep a value that was reported of a request; it is on disk when this returns. None where the request is not
        known yet, and it is not the last try.

        ``key`` tells a repeated report, which counts once, from a further one. ``owner`` must be who made the request,
        unless ``may_any``, and must reach the experiment's alias; a request beyond that is not known at all. Raises
        NotFound for a request that is none of an experiment's, InvalidRequest for a metric or value that was not
        declared or a window that has closed, Conflict for a key that stood for another value.
        """
        now = datetime.now(UTC)
        with self._database.adding() as session:
            trial, plan = _reported(session, request_id, owner if not may_any else None, reaches)
            if trial is None and not is_last_try:
                return None
            if trial is None or plan is None:
                raise NotFound(
                    f"No experiment answered a request '{request_id[:128]}', or its record was lost with a gateway.",
                    param="request_id",
                    near=[],
                )
            number = _number(plan, metric, value)
            if (now - aware(trial.at)).total_seconds() > plan.feedback_window_s:
                raise InvalidRequest(
                    f"The request is older than the {plan.feedback_window_s:g} s in which feedback counts.",
                    param="request_id",
                )
            row = {"request_id": request_id, "metric": metric, "key": key, "value": number, "at": now}
            insert = insert_into(session, FeedbackRow).on_conflict_do_nothing()
            added = session.execute(insert.returning(FeedbackRow.id), [row]).first()
            if added is None and _known(session, request_id, metric, key) != number:
                raise Conflict(
                    "This idempotency key stood for another value of the metric; choose a new one for each report."
                    if key
                    else "The metric was reported for this request before; a further report needs an idempotency_key.",
                    param="idempotency_key",
                )
            if added is not None and (declared := plan.metric(metric)) is not None:
                effects = Effects()
                effects.feedback(trial, metric, way_of(declared), number)
                note_effects(session, {(trial.experiment, trial.phase): effects})
            counts = trial.counts and trial.assignment == Kind.HASH
            return Noted(experiment=trial.experiment, counts=counts, is_repeated=added is None)

    def forget(self, before: datetime) -> int:
        """Take away what was seen of experiments that were archived before then, some of it at a time.

        Returns how many requests that were, or other rows if more; 0 where nothing is left to take. Looks stay, with
        the last results, and so do the sums of arms. Each call is short: on SQLite, all who write wait for it.
        """
        with self._database.adding() as session:
            archived = sa.select(ExperimentRow.id).where(
                ExperimentRow.state == State.ARCHIVED, ExperimentRow.since < before
            )
            some = sa.select(TrialRow.request_id).where(TrialRow.experiment.in_(archived)).limit(FORGOTTEN_AT_ONCE)
            ids = list(session.scalars(some))
            for table in (FeedbackRow, OutcomeRow, TrialRow):
                session.execute(sa.delete(table).where(table.request_id.in_(ids)))
            others = (ExposureRow, PairRow, UnitSumsRow, EffectRow)
            found = max(len(ids), *(_delete_some(session, table, archived) for table in others))
            if found:
                sums = sa.update(PhaseSumsRow).values(state=FORGOTTEN)
                is_ours = PhaseSumsRow.experiment.in_(archived), PhaseSumsRow.state != FORGOTTEN
                session.execute(sums.where(*is_ours))
            return found

    def pairs(self, experiment: str, *, limit: int, before: int | None = None) -> list[tuple[int, Pair]]:
        """Both answers of shadowed requests, newest first, each with its id to page on by."""
        wanted = sa.select(PairRow).where(PairRow.experiment == experiment).order_by(PairRow.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(PairRow.id < before)
        with self._database.reading() as session:
            return [(row.id, _pair(row)) for row in session.scalars(wanted)]


def _added(session: Session, table: type[Table], rows: list[dict[str, Any]]) -> Sequence[Any]:
    """Add those of ``rows`` that are not there yet, and return them."""
    if not rows:
        return ()
    # In one order everywhere, so that two gateways which write the same rows wait for each other one way only.
    keys = [column.name for column in table.__table__.primary_key if column.name in rows[0]]
    rows = sorted(rows, key=lambda row: [row[name] for name in keys])
    insert = insert_into(session, table).on_conflict_do_nothing()
    return session.execute(insert.returning(*table.__table__.columns), rows).all()


def _trials(session: Session, request_ids: Iterable[str]) -> dict[str, Any]:
    """Those that are known, by request."""
    wanted = sa.select(*TrialRow.__table__.columns)
    return {
        trial.request_id: trial
        for some in in_chunks(sorted(request_ids))
        for trial in session.execute(wanted.where(TrialRow.request_id.in_(some)))
    }


def _delete_some(session: Session, table: type[Seen], experiments: Any) -> int:
    """Delete up to ``FORGOTTEN_AT_ONCE`` rows of ``experiments``; returns how many."""
    keys = list(table.__table__.primary_key)
    some = sa.select(*keys).where(table.experiment.in_(experiments)).limit(FORGOTTEN_AT_ONCE)
    deleted = session.execute(sa.delete(table).where(sa.tuple_(*keys).in_(some)).returning(*keys))
    return len(deleted.all())


def _values(event: Event) -> dict[str, Any]:
    if not isinstance(event, Outcome):
        return {name: _storable(value) for name, value in asdict(event).items()}
    return {
        "request_id": event.request_id,
        "status": event.status,
        "is_cold": event.is_cold,
        "ln_first_s": event.ln_first_s,
        "ln_token_s": event.ln_token_s,
        "prompt_tokens": event.prompt_tokens,
        "completion_tokens": event.completion_tokens,
    }


def _storable(value: Any) -> Any:
    """PostgreSQL's text holds no NUL."""
    return value.replace("\0", "\N{REPLACEMENT CHARACTER}") if isinstance(value, str) and "\0" in value else value


def _reported(
    session: Session, request_id: str, owner: str | None, reaches: Callable[[str], bool]
) -> tuple[TrialRow | None, Plan | None]:
    """The request and its experiment's plan; nothing where ``owner`` is given and made it not, or that is beyond reach.

    What is beyond reach is looked for as long as what does not exist, so that time tells nothing of it either.
    """
    wanted = sa.select(TrialRow, ExperimentRow.plan).join(ExperimentRow, ExperimentRow.id == TrialRow.experiment)
    found = session.execute(wanted.where(TrialRow.request_id == request_id)).first()
    if found is None:
        return None, None
    trial, plan = found[0], Plan.model_validate(found[1])
    may = (owner is None or trial.owner == owner) and reaches(plan.alias)
    return (trial, plan) if may else (None, None)


def _number(plan: Plan, name: str, value: bool | float) -> float:
    metric = plan.metric(name)
    if metric is None:
        known = ", ".join(found.name for found in plan.metrics) or "none"
        raise InvalidRequest(f"The experiment declared no metric '{name[:64]}'; it has {known}.", param="metric")
    return _checked(metric, value)


def _checked(metric: Metric, value: bool | float) -> float:
    if metric.kind == "bool" and value not in (0, 1):
        raise InvalidRequest(f"'{metric.name}' takes true or false.", param="value")
    if metric.kind == "float" and isinstance(value, bool):
        raise InvalidRequest(f"'{metric.name}' takes a number.", param="value")
    if not abs(value) <= MAX_VALUE:
        raise InvalidRequest(f"'{metric.name}' takes a number of at most {MAX_VALUE:g}.", param="value")
    return float(value)


def _known(session: Session, request_id: str, metric: str, key: str) -> float | None:
    wanted = sa.select(FeedbackRow.value).where(
        FeedbackRow.request_id == request_id, FeedbackRow.metric == metric, FeedbackRow.key == key
    )
    return session.scalar(wanted)


def _pair(row: PairRow) -> Pair:
    return Pair(
        experiment=row.experiment,
        phase=row.phase,
        request_id=row.request_id,
        served=row.served,
        shadow=row.shadow,
        prompt=row.prompt,
        answer=row.answer,
        shadow_answer=row.shadow_answer,
        at=aware(row.at),
    )
