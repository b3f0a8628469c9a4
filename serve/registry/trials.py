"""What was seen of experiments, written down: exposures, trials, outcomes, pairs of answers, and feedback."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict, InvalidRequest, NotFound
from serve.experiments.assignment import Kind
from serve.experiments.definition import Metric, Plan
from serve.experiments.events import Event, Exposure, Outcome, Pair, Trial
from serve.experiments.records import State
from serve.registry.database import Database
from serve.registry.experiment_tables import (
    ExperimentRow,
    ExposureRow,
    FeedbackRow,
    OutcomeRow,
    PairRow,
    TrialRow,
)
from serve.registry.repository import aware
from serve.registry.tables import Table

TABLES: Mapping[type[Event], type[Table]] = {
    Exposure: ExposureRow,
    Trial: TrialRow,
    Outcome: OutcomeRow,
    Pair: PairRow,
}
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
        """Write down what was seen, all or nothing. Of a unit's exposures in a phase, the first one stays."""
        rows: dict[type[Event], list[dict[str, Any]]] = defaultdict(list)
        for event in events:
            rows[type(event)].append(_values(event))
        with self._database.adding() as session:
            for kind, table in TABLES.items():
                if rows[kind]:
                    session.execute(_insert(session, table).on_conflict_do_nothing(), rows[kind])

    def feedback(
        self,
        request_id: str,
        metric: str,
        value: bool | float,
        *,
        key: str,
        owner: str,
        may_any: bool = False,
        is_last_try: bool = True,
    ) -> Noted | None:
        """Keep a value that was reported of a request; it is on disk when this returns. None where the request is not
        known yet, and it is not the last try.

        ``key`` tells a repeated report, which counts once, from a further one. ``owner`` must be who made the request,
        unless ``may_any``. Raises NotFound for a request that is none of an experiment's, InvalidRequest for a metric
        or value that was not declared or a window that has closed, Conflict for a key that stood for another value.
        """
        now = datetime.now(UTC)
        with self._database.adding() as session:
            trial = session.get(TrialRow, request_id)
            if trial is None and not is_last_try:
                return None
            if trial is None or not (may_any or trial.owner == owner):
                raise NotFound(
                    f"No experiment answered a request '{request_id[:128]}', or its record was lost with a gateway.",
                    param="request_id",
                    near=[],
                )
            plan = Plan.model_validate(_plan(session, trial.experiment))
            number = _number(plan, metric, value)
            if (now - aware(trial.at)).total_seconds() > plan.feedback_window_s:
                raise InvalidRequest(
                    f"The request is older than the {plan.feedback_window_s:g} s in which feedback counts.",
                    param="request_id",
                )
            row = {"request_id": request_id, "metric": metric, "key": key, "value": number, "at": now}
            added = session.execute(
                _insert(session, FeedbackRow).on_conflict_do_nothing().returning(FeedbackRow.id), [row]
            ).first()
            if added is None and _known(session, request_id, metric, key) != number:
                raise Conflict(
                    "This idempotency key stood for another value of the metric; choose a new one for each report."
                    if key
                    else "The metric was reported for this request before; a further report needs an idempotency_key.",
                    param="idempotency_key",
                )
            counts = trial.counts and trial.assignment == Kind.HASH
            return Noted(experiment=trial.experiment, counts=counts, is_repeated=added is None)

    def forget(self, before: datetime) -> int:
        """Take away what was seen of experiments that were archived before then, some of it at a time.

        Returns how many requests that were, or other rows if more; 0 where nothing is left to take. Looks stay, with
        the last results. Each call is short: on SQLite, all who write wait for it.
        """
        with self._database.adding() as session:
            archived = sa.select(ExperimentRow.id).where(
                ExperimentRow.state == State.ARCHIVED, ExperimentRow.since < before
            )
            some = sa.select(TrialRow.request_id).where(TrialRow.experiment.in_(archived)).limit(FORGOTTEN_AT_ONCE)
            ids = list(session.scalars(some))
            for table in (FeedbackRow, OutcomeRow, TrialRow):
                session.execute(sa.delete(table).where(table.request_id.in_(ids)))
            return max(len(ids), *(_delete_some(session, seen, archived) for seen in (ExposureRow, PairRow)))

    def pairs(self, experiment: str, *, limit: int, before: int | None = None) -> list[tuple[int, Pair]]:
        """Both answers of shadowed requests, newest first, each with its id to page on by."""
        wanted = sa.select(PairRow).where(PairRow.experiment == experiment).order_by(PairRow.id.desc()).limit(limit)
        if before is not None:
            wanted = wanted.where(PairRow.id < before)
        with self._database.reading() as session:
            return [(row.id, _pair(row)) for row in session.scalars(wanted)]


def _delete_some(session: Session, table: type[ExposureRow] | type[PairRow], experiments: Any) -> int:
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


def _insert(session: Session, table: type[Table]) -> Any:
    """An insert that can leave out what is there; each database spells it in its own way."""
    is_sqlite = session.get_bind().dialect.name == "sqlite"
    return sqlite.insert(table) if is_sqlite else postgresql.insert(table)


def _plan(session: Session, experiment: str) -> dict[str, Any]:
    return session.execute(sa.select(ExperimentRow.plan).where(ExperimentRow.id == experiment)).scalar_one()


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
