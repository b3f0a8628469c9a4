"""Evidence added up by the database from all rows, at each look: another way to what the sums are kept up to be."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from serve.experiments.assignment import Kind
from serve.experiments.definition import ERROR_RATE, FIRST_TOKEN, TOKEN_TIME, Metric, Plan
from serve.experiments.effects import FAULT
from serve.registry.database import Database
from serve.registry.experiment_tables import ExposureRow, FeedbackRow, OutcomeRow, TrialRow

LIMIT_S = 600.0
COLD = "cold"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """n, Σy, Σx, Σy², Σxy, Σx² over units with any x."""

    n: int = 0
    y: float = 0.0
    x: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    xx: float = 0.0
    is_binary: bool = False

    @property
    def mean(self) -> float | None:
        return self.y / self.x if self.x else None


@dataclass(slots=True)
class Arm:
    units: int = 0
    requests: int = 0
    fallbacks: int = 0
    cold_requests: int = 0
    cold_ln_first_s: float | None = None
    metrics: dict[str, Sums] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Added:
    arms: Mapping[str, Arm]
    excluded: Mapping[str, int]
    switched_units: int


def added_up(database: Database, experiment: str, phase: int, plan: Plan) -> Added:
    with database.reading(LIMIT_S) as session:
        if session.get_bind().dialect.name == "postgresql":
            session.execute(sa.text(f"SET LOCAL statement_timeout = '{LIMIT_S}s'"))
        arms = _exposed(session, experiment, phase)
        excluded = _requests(session, experiment, phase, arms)
        _outcomes(session, experiment, phase, arms)
        _feedback(session, experiment, phase, plan, arms)
        return Added(arms=arms, excluded=excluded, switched_units=_switched(session, experiment, phase))


def _exposed(session: Session, experiment: str, phase: int) -> dict[str, Arm]:
    wanted = (
        sa.select(ExposureRow.arm, sa.func.count())
        .where(ExposureRow.experiment == experiment, ExposureRow.phase == phase)
        .group_by(ExposureRow.arm)
    )
    return {arm: Arm(units=count) for arm, count in session.execute(wanted)}


def _requests(session: Session, experiment: str, phase: int, arms: dict[str, Arm]) -> dict[str, int]:
    """Fills in how many requests each arm had; returns how many others there were, by kind."""
    excluded: dict[str, int] = {}
    wanted = (
        sa.select(TrialRow.arm, TrialRow.assignment, TrialRow.counts, sa.func.count())
        .where(TrialRow.experiment == experiment, TrialRow.phase == phase)
        .group_by(TrialRow.arm, TrialRow.assignment, TrialRow.counts)
    )
    for arm, assignment, counts, number in session.execute(wanted):
        if counts and assignment == Kind.HASH:
            arms.setdefault(str(arm), Arm()).requests += number
            continue
        if counts and assignment == Kind.FALLBACK:
            arms.setdefault(str(arm), Arm()).fallbacks += number
        kind = assignment if assignment != Kind.HASH else "after_decision"
        excluded[kind] = excluded.get(kind, 0) + number
    return excluded


def _outcomes(session: Session, experiment: str, phase: int, arms: dict[str, Arm]) -> None:
    """Faults of all that an arm should have answered; times of what it did answer, warm, and apart of what it answered
    cold. One pass, since requests are what there is most of."""
    is_answer = sa.and_(OutcomeRow.status < 400, TrialRow.assignment == Kind.HASH)
    is_warm, is_cold = (sa.and_(is_answer, OutcomeRow.is_cold.is_(cold)) for cold in (False, True))
    is_fault = sa.or_(OutcomeRow.status >= FAULT, TrialRow.assignment == Kind.FALLBACK)
    counted = {
        ERROR_RATE: (sa.case((is_fault, 1.0), else_=0.0), sa.literal(1.0)),
        FIRST_TOKEN: _timed(OutcomeRow.ln_first_s, is_warm),
        TOKEN_TIME: _timed(OutcomeRow.ln_token_s, is_warm),
        COLD: _timed(OutcomeRow.ln_first_s, is_cold),
    }
    columns = [
        sa.func.sum(part).label(f"{axis}_{name}")
        for name, both in counted.items()
        for axis, part in zip("yx", both, strict=True)
    ]
    units = (
        sa.select(TrialRow.arm, TrialRow.unit, *columns)
        .join(OutcomeRow, OutcomeRow.request_id == TrialRow.request_id)
        .where(*_counting(experiment, phase))
        .group_by(TrialRow.arm, TrialRow.unit)
        .subquery()
    )
    sums = [part for name in counted for part in _added_up(units.c[f"y_{name}"], units.c[f"x_{name}"])]
    for arm, *row in session.execute(sa.select(units.c.arm, *sums).group_by(units.c.arm)):
        found = arms.setdefault(arm, Arm())
        for place, name in enumerate(counted):
            part = _sums(row[6 * place : 6 * place + 6], is_binary=name == ERROR_RATE)
            if name == COLD:
                found.cold_requests, found.cold_ln_first_s = round(part.x), part.mean
            else:
                found.metrics[name] = part


def _feedback(session: Session, experiment: str, phase: int, plan: Plan, arms: dict[str, Arm]) -> None:
    counting = (*_counting(experiment, phase), TrialRow.assignment == Kind.HASH)
    given = (
        sa.select(
            TrialRow.arm,
            TrialRow.unit,
            FeedbackRow.metric,
            sa.func.sum(FeedbackRow.value).label("total"),
            sa.func.max(FeedbackRow.value).label("most"),
            sa.func.count().label("given"),
        )
        .join(FeedbackRow, FeedbackRow.request_id == TrialRow.request_id)
        .where(*counting)
        .group_by(TrialRow.arm, TrialRow.unit, FeedbackRow.metric)
        .subquery()
    )
    ways = {
        "feedback": (given.c.total, given.c.given),
        "any": (given.c.most, sa.literal(1.0)),
        "sum": (given.c.total, sa.literal(1.0)),
    }
    limited = {way: (_limited(y, x, plan.metrics, given.c.metric), x) for way, (y, x) in ways.items()}
    sums = [part for both in limited.values() for part in _added_up(*both)]
    grouped = sa.select(given.c.arm, given.c.metric, *sums).group_by(given.c.arm, given.c.metric)
    rows = {(arm, name): row for arm, name, *row in session.execute(grouped)}
    for metric in plan.metrics:
        if metric.level == "request":
            found = _each_request(session, counting, metric)
        else:
            way = "feedback" if metric.level == "feedback" else "any" if metric.kind == "bool" else "sum"
            place = 6 * list(ways).index(way)
            found = {arm: row[place : place + 6] for (arm, name), row in rows.items() if name == metric.name}
        is_binary = metric.kind == "bool"
        for name, arm in arms.items():
            sums_of = _sums(found[name], is_binary=is_binary) if name in found else Sums(is_binary=is_binary)
            if metric.level == "unit":
                # Units without feedback count, as 0.
                sums_of = replace(sums_of, n=arm.units, x=float(arm.units), xx=float(arm.units))
            arm.metrics[metric.name] = sums_of


def _limited(y: Any, x: Any, metrics: Iterable[Metric], name: Any = None) -> Any:
    """y within what each of ``metrics`` lets a unit's mean count as; ``name``: the column that says which it is."""
    for metric in metrics:
        is_mine = sa.true() if name is None else name == metric.name
        if metric.cap is not None:
            y = sa.case((sa.and_(is_mine, y > metric.cap * x), metric.cap * x), else_=y)
        if metric.floor is not None:
            y = sa.case((sa.and_(is_mine, y < metric.floor * x), metric.floor * x), else_=y)
    return y


def _each_request(session: Session, counting: tuple[Any, ...], metric: Metric) -> dict[str, list[Any]]:
    """Sums by arm where every request counts, as 0 without feedback. Joined row by row, by key: to join what was added
    up, a database that has not looked at its tables lately may compare everything with everything."""
    reported = sa.and_(FeedbackRow.request_id == TrialRow.request_id, FeedbackRow.metric == metric.name)
    units = (
        sa.select(
            TrialRow.arm,
            TrialRow.unit,
            sa.func.coalesce(sa.func.sum(FeedbackRow.value), 0.0).label("total"),
            sa.func.count(sa.distinct(TrialRow.request_id)).label("asked"),
        )
        .join(FeedbackRow, reported, isouter=True)
        .where(*counting)
        .group_by(TrialRow.arm, TrialRow.unit)
        .subquery()
    )
    wanted = sa.select(
        units.c.arm, *_added_up(_limited(units.c.total, units.c.asked, [metric]), units.c.asked)
    ).group_by(units.c.arm)
    return {arm: row for arm, *row in session.execute(wanted)}


def _switched(session: Session, experiment: str, phase: int) -> int:
    """Units that were seen in more than one arm."""
    several = (
        sa.select(TrialRow.unit)
        .where(*_counting(experiment, phase))
        .group_by(TrialRow.unit)
        .having(sa.func.count(sa.distinct(TrialRow.arm)) > 1)
        .subquery()
    )
    return session.scalar(sa.select(sa.func.count()).select_from(several)) or 0


def _counting(experiment: str, phase: int) -> tuple[Any, ...]:
    """What is evidence; all of it has a unit."""
    return TrialRow.experiment == experiment, TrialRow.phase == phase, TrialRow.counts.is_(True)


def _timed(value: Any, condition: Any) -> tuple[Any, Any]:
    there = sa.and_(condition, value.is_not(None))
    return sa.case((there, value), else_=0.0), sa.case((there, 1.0), else_=0.0)


def _added_up(y: Any, x: Any) -> list[Any]:
    """n, Σy, Σx, Σy², Σxy, Σx² over units that have any x; y is 0 where x is."""
    there = sa.func.sum(sa.case((x > 0, 1), else_=0))
    return [there, *(sa.func.sum(part) for part in (y, x, y * y, x * y, x * x))]


def _sums(row: list[Any], *, is_binary: bool) -> Sums:
    n, y, x, yy, xy, xx = row
    return Sums(n=int(n), y=float(y), x=float(x), yy=float(yy), xy=float(xy), xx=float(xx), is_binary=is_binary)
