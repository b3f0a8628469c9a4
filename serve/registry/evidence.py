"""What was seen of one phase, added up in the database: sums over units, by arm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from serve.experiments.analysis import ArmEvidence, Evidence
from serve.experiments.assignment import Kind
from serve.experiments.definition import ERROR_RATE, FIRST_TOKEN, TOKEN_TIME, Metric, Plan
from serve.experiments.statistics import Sums
from serve.registry.database import Database
from serve.registry.experiment_tables import ExposureRow, FeedbackRow, LookRow, OutcomeRow, TrialRow
from serve.registry.repository import aware

FAULT = 500
"""Statuses from here on are the service's fault; those below are the caller's, or load that all arms share."""
KEPT_LOOKS = 400


@dataclass(frozen=True, slots=True)
class Look:
    at: datetime
    results: Mapping[str, Any]


@dataclass(slots=True)
class _Arm:
    units: int = 0
    requests: int = 0
    fallbacks: int = 0
    cold_requests: int = 0
    cold_ln_first_s: float | None = None
    metrics: dict[str, Sums] = field(default_factory=dict)


class EvidenceReader:
    """Reads; the looks that it keeps are results, for the pictures of how they came."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def of(self, experiment: str, phase: int, plan: Plan) -> Evidence:
        """Everything that the analysis of a phase needs."""
        with self._database.reading() as session:
            arms = _exposed(session, experiment, phase)
            excluded = _requests(session, experiment, phase, arms)
            _outcomes(session, experiment, phase, arms)
            _cold(session, experiment, phase, arms)
            _feedback(session, experiment, phase, plan, arms)
            return Evidence(
                arms={
                    name: ArmEvidence(
                        units=arm.units,
                        requests=arm.requests,
                        fallbacks=arm.fallbacks,
                        cold_requests=arm.cold_requests,
                        cold_ln_first_s=arm.cold_ln_first_s,
                        metrics=arm.metrics,
                    )
                    for name, arm in arms.items()
                },
                excluded=excluded,
                switched_units=_switched(session, experiment, phase),
            )

    def keep(self, experiment: str, phase: int, at: datetime, results: Mapping[str, Any]) -> None:
        """Remember results as they were; every second of the oldest goes when there are many."""
        with self._database.adding() as session:
            session.add(LookRow(experiment=experiment, phase=phase, at=at, results=dict(results)))
            session.flush()
            mine = sa.and_(LookRow.experiment == experiment, LookRow.phase == phase)
            times = list(session.scalars(sa.select(LookRow.at).where(mine).order_by(LookRow.at)))
            if len(times) > KEPT_LOOKS:
                thinned = times[1 : len(times) // 2 : 2]
                session.execute(sa.delete(LookRow).where(mine, LookRow.at.in_(thinned)))

    def lowest_p(self, experiment: str, phase: int) -> float:
        """The smallest p-value of the shares at any look so far: each look carries the smallest before it."""
        wanted = (
            sa.select(LookRow.results)
            .where(LookRow.experiment == experiment, LookRow.phase == phase)
            .order_by(LookRow.at.desc())
            .limit(1)
        )
        with self._database.reading() as session:
            last = session.scalar(wanted)
            return 1.0 if last is None else float(last["shares"]["p_value"])

    def looks(self, experiment: str, phase: int) -> list[Look]:
        """Oldest first."""
        wanted = sa.select(LookRow).where(LookRow.experiment == experiment, LookRow.phase == phase)
        with self._database.reading() as session:
            return [Look(aware(row.at), dict(row.results)) for row in session.scalars(wanted.order_by(LookRow.at))]


def _exposed(session: Session, experiment: str, phase: int) -> dict[str, _Arm]:
    wanted = (
        sa.select(ExposureRow.arm, sa.func.count())
        .where(ExposureRow.experiment == experiment, ExposureRow.phase == phase)
        .group_by(ExposureRow.arm)
    )
    return {arm: _Arm(units=count) for arm, count in session.execute(wanted)}


def _requests(session: Session, experiment: str, phase: int, arms: dict[str, _Arm]) -> dict[str, int]:
    """Fills in how many requests each arm had; returns how many others there were, by kind."""
    excluded: dict[str, int] = {}
    wanted = (
        sa.select(TrialRow.arm, TrialRow.assignment, TrialRow.counts, sa.func.count())
        .where(TrialRow.experiment == experiment, TrialRow.phase == phase)
        .group_by(TrialRow.arm, TrialRow.assignment, TrialRow.counts)
    )
    for arm, assignment, counts, number in session.execute(wanted):
        if counts and assignment == Kind.HASH:
            arms.setdefault(str(arm), _Arm()).requests += number
            continue
        if counts and assignment == Kind.FALLBACK:
            arms.setdefault(str(arm), _Arm()).fallbacks += number
        kind = assignment if assignment != Kind.HASH else "after_decision"
        excluded[kind] = excluded.get(kind, 0) + number
    return excluded


def _outcomes(session: Session, experiment: str, phase: int, arms: dict[str, _Arm]) -> None:
    """Faults of all that an arm should have answered; times of what it did answer, warm."""
    is_fault = sa.or_(OutcomeRow.status >= FAULT, TrialRow.assignment == Kind.FALLBACK)
    is_timed = sa.and_(OutcomeRow.status < 400, OutcomeRow.is_cold.is_(False), TrialRow.assignment == Kind.HASH)
    counted = {
        ERROR_RATE: (sa.case((is_fault, 1.0), else_=0.0), sa.literal(1.0)),
        FIRST_TOKEN: _timed(OutcomeRow.ln_first_s, is_timed),
        TOKEN_TIME: _timed(OutcomeRow.ln_token_s, is_timed),
    }
    columns = [
        sa.func.sum(part).label(f"{axis}_{name}")
        for name, both in counted.items()
        for axis, part in zip("yx", both, strict=True)
    ]
    units = (
        sa.select(TrialRow.arm, TrialRow.unit, *columns)
        .join(OutcomeRow, OutcomeRow.request_id == TrialRow.request_id)
        .where(*_counting(experiment, phase), TrialRow.unit.is_not(None))
        .group_by(TrialRow.arm, TrialRow.unit)
        .subquery()
    )
    for name in counted:
        y, x = units.c[f"y_{name}"], units.c[f"x_{name}"]
        wanted = sa.select(units.c.arm, *_added_up(y, x)).where(x > 0).group_by(units.c.arm)
        for arm, *sums in session.execute(wanted):
            arms.setdefault(arm, _Arm()).metrics[name] = _sums(sums, is_binary=name == ERROR_RATE)


def _cold(session: Session, experiment: str, phase: int, arms: dict[str, _Arm]) -> None:
    wanted = (
        sa.select(TrialRow.arm, sa.func.count(), sa.func.avg(OutcomeRow.ln_first_s))
        .join(OutcomeRow, OutcomeRow.request_id == TrialRow.request_id)
        .where(*_counting(experiment, phase), TrialRow.assignment == Kind.HASH, OutcomeRow.is_cold.is_(True))
        .group_by(TrialRow.arm)
    )
    for arm, count, mean in session.execute(wanted):
        found = arms.setdefault(arm, _Arm())
        found.cold_requests, found.cold_ln_first_s = count, mean


def _feedback(session: Session, experiment: str, phase: int, plan: Plan, arms: dict[str, _Arm]) -> None:
    counting = (*_counting(experiment, phase), TrialRow.assignment == Kind.HASH)
    asked = (
        sa.select(TrialRow.arm, TrialRow.unit, sa.func.count().label("asked"))
        .where(*counting, TrialRow.unit.is_not(None))
        .group_by(TrialRow.arm, TrialRow.unit)
        .subquery()
    )
    total = sa.select(asked.c.arm, sa.func.sum(asked.c.asked), sa.func.sum(asked.c.asked * asked.c.asked))
    requests = {arm: (x, xx) for arm, x, xx in session.execute(total.group_by(asked.c.arm))}
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
        .where(*counting, TrialRow.unit.is_not(None))
        .group_by(TrialRow.arm, TrialRow.unit, FeedbackRow.metric)
        .subquery()
    )
    joined = given.join(asked, sa.and_(asked.c.arm == given.c.arm, asked.c.unit == given.c.unit))
    for metric in plan.metrics:
        is_any = metric.level == "unit" and metric.kind == "bool"
        y = given.c.most if is_any else given.c.total
        x = {"unit": sa.literal(1.0), "request": asked.c.asked, "feedback": given.c.given}[metric.level]
        wanted = sa.select(given.c.arm, *_added_up(y, x)).select_from(joined).where(given.c.metric == metric.name)
        found = {
            arm: _sums(sums, is_binary=metric.kind == "bool")
            for arm, *sums in session.execute(wanted.group_by(given.c.arm))
        }
        for name, arm in arms.items():
            arm.metrics[metric.name] = _widened(metric, found.get(name, Sums()), arm.units, requests.get(name, (0, 0)))


def _widened(metric: Metric, sums: Sums, units: int, requests: tuple[float, float]) -> Sums:
    """With the units that gave no feedback, where they count: y is 0 for them, and x is not."""
    sums = replace(sums, is_binary=metric.kind == "bool")
    if metric.level == "unit":
        return replace(sums, n=units, x=float(units), xx=float(units))
    if metric.level == "request":
        return replace(sums, n=units, x=float(requests[0] or 0), xx=float(requests[1] or 0))
    return sums


def _switched(session: Session, experiment: str, phase: int) -> int:
    """Units that were seen in more than one arm."""
    several = (
        sa.select(TrialRow.unit)
        .where(*_counting(experiment, phase), TrialRow.unit.is_not(None))
        .group_by(TrialRow.unit)
        .having(sa.func.count(sa.distinct(TrialRow.arm)) > 1)
        .subquery()
    )
    return session.scalar(sa.select(sa.func.count()).select_from(several)) or 0


def _counting(experiment: str, phase: int) -> tuple[Any, ...]:
    return TrialRow.experiment == experiment, TrialRow.phase == phase, TrialRow.counts.is_(True)


def _timed(value: Any, condition: Any) -> tuple[Any, Any]:
    there = sa.and_(condition, value.is_not(None))
    return sa.case((there, value), else_=0.0), sa.case((there, 1.0), else_=0.0)


def _added_up(y: Any, x: Any) -> list[Any]:
    sums = [sa.func.sum(part) for part in (y, x, y * y, x * y, x * x)]
    return [sa.func.count(), *sums]


def _sums(row: list[Any], *, is_binary: bool) -> Sums:
    n, y, x, yy, xy, xx = row
    return Sums(n=n, y=float(y), x=float(x), yy=float(yy), xy=float(xy), xx=float(xx), is_binary=is_binary)
