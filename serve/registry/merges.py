"""Merge jobs of the registry. Whoever works on one holds a lease, and a fence that its successors' will exceed.

Progress moves no revision: gateways follow what can be served, and read jobs when they are asked.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from itertools import islice
from typing import Any

from sqlalchemy import delete, or_, select
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict, LoomError, NotFound
from serve.registry.database import Database
from serve.registry.merge_tables import CheckpointRow, MergeLogRow, MergeRow, MergeUnitRow
from serve.registry.repository import aware, note


class MergeState(StrEnum):
    """``queued → [searching →] merging → verifying → publishing → succeeded``, or to one of the other ends."""

    QUEUED = "queued"
    SEARCHING = "searching"
    MERGING = "merging"
    VERIFYING = "verifying"
    PUBLISHING = "publishing"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    CANCELLED = "cancelled"


IMPOSSIBLE_LEASES = 10
"""So many times the length of a lease is more than clocks of different machines may differ by."""
ENDED = (MergeState.SUCCEEDED, MergeState.FAILED, MergeState.CANCELLED)


class LeaseLost(LoomError):
    """Another owner works on the job by now; what this one does counts no more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeUnit:
    """One task's work. ``state``: waiting, running or done."""

    unit: str
    kind: str
    num_bytes: int
    state: str = "waiting"
    done_bytes: int = 0
    node: str = ""
    seconds: float | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeJob:
    """A job as it stands. ``plan``: of :class:`lora_runtime.merge.job.Plan`, dumped. ``trials``: of a search so far."""

    id: str
    name: str
    target: str
    state: MergeState
    plan: Mapping[str, Any]
    plan_id: str
    actor: str
    created_at: datetime
    started_at: datetime | None
    ended_at: datetime | None
    trials: tuple[Any, ...]
    report: Mapping[str, Any] | None
    error: str | None
    is_cancelled: bool
    fence: int

    @property
    def holder(self) -> str:
        """Whom versions are held for in the store while the job runs."""
        return f"merge/{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class MergeLine:
    id: int
    at: datetime
    level: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A merged base, and what it came from."""

    name: str
    version: str
    location: str
    base: str
    job: str
    parents: Mapping[str, str]
    num_bytes: int
    created_at: datetime


class Merges:
    """Jobs, read and changed. Every method may raise RegistryUnavailable; calls block."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def create(self, name: str, plan: Mapping[str, Any], plan_id: str, *, actor: str, target: str = "") -> MergeJob:
        """A queued job. Raises Conflict where another of this name is under way, or a checkpoint has the name."""
        now = datetime.now(UTC)
        row = MergeRow(
            id=f"merge_{secrets.token_hex(8)}",
            name=name,
            target=target,
            state=MergeState.QUEUED,
            plan=dict(plan),
            plan_id=plan_id,
            actor=actor,
            created_at=now,
            trials=[],
        )
        with self._database.alone() as session:
            if (known := _under_way(session, name, target)) is not None:
                said = f"'{name}' is being made already, by {known.id}. Wait for it, or cancel it."
                raise Conflict(said, job=known.id)
            if plan["recipe"]["product"] == "checkpoint" and not target and session.get(CheckpointRow, name):
                raise Conflict(f"There is a checkpoint '{name}' already; choose another name.")
            session.add(row)
            note(session, actor, "merge.create", row.id, name=name, method=plan["recipe"]["method"])
            session.flush()
            return _job(row)

    def get(self, identifier: str) -> MergeJob:
        """Raises NotFound."""
        with self._database.reading() as session:
            return _job(_row(session, identifier))

    def all(
        self, *, limit: int = 100, state: MergeState | None = None, reaches: Callable[[str], bool] = lambda name: True
    ) -> list[MergeJob]:
        """Newest first, of those whose name ``reaches`` says so."""
        wanted = select(MergeRow).order_by(MergeRow.created_at.desc(), MergeRow.id).execution_options(yield_per=100)
        if state is not None:
            wanted = wanted.where(MergeRow.state == state)
        with self._database.reading() as session:
            return [_job(row) for row in islice((row for row in session.scalars(wanted) if reaches(row.name)), limit)]

    def under_way(self, name: str, target: str = "") -> MergeJob | None:
        """The job of this name that has not ended."""
        with self._database.reading() as session:
            row = _under_way(session, name, target)
            return None if row is None else _job(row)

    def num_open(self) -> int:
        """Jobs that have not ended."""
        with self._database.reading() as session:
            return len(session.scalars(select(MergeRow.id).where(MergeRow.state.not_in(ENDED))).all())

    def progress(self, identifier: str) -> tuple[MergeJob, list[MergeUnit]]:
        """A job and its units as they were at one moment. Raises NotFound."""
        with self._database.reading():
            return self.get(identifier), self.units(identifier)

    def units(self, identifier: str) -> list[MergeUnit]:
        wanted = select(MergeUnitRow).where(MergeUnitRow.job == identifier).order_by(MergeUnitRow.number)
        with self._database.reading() as session:
            return [_unit(row) for row in session.scalars(wanted)]

    def log(self, identifier: str, *, after: int = 0, limit: int = 1000) -> list[MergeLine]:
        """Lines in order; ``after``: an id, to read on from."""
        wanted = select(MergeLogRow).where(MergeLogRow.job == identifier, MergeLogRow.id > after)
        with self._database.reading() as session:
            rows = session.scalars(wanted.order_by(MergeLogRow.id).limit(limit))
            return [MergeLine(id=row.id, at=aware(row.at), level=row.level, message=row.message) for row in rows]

    def checkpoints(self) -> list[Checkpoint]:
        with self._database.reading() as session:
            return [_checkpoint(row) for row in session.scalars(select(CheckpointRow).order_by(CheckpointRow.name))]

    def checkpoint(self, name: str) -> Checkpoint:
        """Raises NotFound."""
        with self._database.reading() as session:
            row = session.get(CheckpointRow, name)
            if row is None:
                raise NotFound(f"There is no checkpoint '{name[:128]}'.", near=[])
            return _checkpoint(row)

    def cancel(self, identifier: str, *, actor: str) -> MergeJob:
        """Ask whoever works on the job to stop. Nothing happens to one that has ended, or whose result is being
        published. Raises NotFound."""
        with self._database.alone() as session:
            row = _row(session, identifier)
            if row.state not in (*ENDED, MergeState.PUBLISHING) and not row.is_cancelled:
                row.is_cancelled = True
                note(session, actor, "merge.cancel", row.id, name=row.name)
            session.flush()
            return _job(row)

    def claim(self, owner: str, seconds: float, *, other_than: Iterable[str] = ()) -> MergeJob | None:
        """A job that nobody works on, the oldest first, for ``owner`` alone from now on."""
        now = datetime.now(UTC)
        # A lease that runs longer than any is given for was written before the clock was set back.
        impossible = now + timedelta(seconds=IMPOSSIBLE_LEASES * seconds)
        free = or_(MergeRow.leased_until.is_(None), MergeRow.leased_until < now, MergeRow.leased_until > impossible)
        wanted = select(MergeRow).where(MergeRow.state.not_in(ENDED), free, MergeRow.id.not_in(list(other_than)))
        with self._database.alone() as session:
            row = session.scalars(wanted.order_by(MergeRow.created_at, MergeRow.id).limit(1)).first()
            if row is None:
                return None
            row.owner, row.fence, row.leased_until = owner, row.fence + 1, now + timedelta(seconds=seconds)
            row.started_at = row.started_at or now
            session.flush()
            return _job(row)

    def renew(self, job: MergeJob, seconds: float) -> MergeJob:
        """The job as it stands, for its owner for so long again. Raises LeaseLost."""
        with self._held(job) as (_, row):
            row.leased_until = datetime.now(UTC) + timedelta(seconds=seconds)
            return _job(row)

    def release(self, job: MergeJob) -> None:
        """Let another owner have the job at once. Raises LeaseLost."""
        with self._held(job) as (_, row):
            row.leased_until = None

    def move(self, job: MergeJob, state: MergeState, message: str, *, plan: Mapping[str, Any] | None = None) -> bool:
        """To a state under way; ``plan``: another one from now on. False, and nothing is changed, where the job was
        cancelled. Raises LeaseLost."""
        with self._held(job) as (session, row):
            if row.is_cancelled:
                return False
            row.state = state
            if plan is not None:
                row.plan = dict(plan)
            _say(session, row, message)
            return True

    def say(self, job: MergeJob, message: str, *, level: str = "info") -> None:
        """Add a line to the log. Raises LeaseLost."""
        with self._held(job) as (session, row):
            _say(session, row, message, level)

    def tried(self, job: MergeJob, trials: Iterable[Any]) -> None:
        """Keep a search's trials so far. Raises LeaseLost."""
        with self._held(job) as (_, row):
            row.trials = list(trials)

    def set_units(self, job: MergeJob, units: Iterable[MergeUnit], *, first: int = 0) -> None:
        """What there is to do, and how far it is; ``first``: the place of the first of ``units``. Raises LeaseLost."""
        with self._held(job) as (session, row):
            for number, unit in enumerate(units, first):
                session.merge(
                    MergeUnitRow(
                        job=row.id,
                        unit=unit.unit,
                        number=number,
                        kind=unit.kind,
                        state=unit.state,
                        num_bytes=unit.num_bytes,
                        done_bytes=unit.done_bytes,
                        node=unit.node,
                        seconds=unit.seconds,
                        peak_bytes=unit.peak_bytes,
                    )
                )

    def finish(
        self,
        job: MergeJob,
        state: MergeState,
        message: str,
        *,
        report: Mapping[str, Any] | None = None,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """End the job; with it, in one transaction, its ``checkpoint`` is there. Raises LeaseLost."""
        with self._held(job) as (session, row):
            row.state, row.ended_at, row.leased_until = state, datetime.now(UTC), None
            row.report = None if report is None else dict(report)
            row.error = message if state is MergeState.FAILED else None
            _say(session, row, message, "error" if state is MergeState.FAILED else "info")
            note(session, row.actor, f"merge.{state}", row.id, name=row.name)
            if checkpoint is not None:
                session.execute(delete(CheckpointRow).where(CheckpointRow.name == checkpoint.name))
                session.add(
                    CheckpointRow(
                        name=checkpoint.name,
                        version=checkpoint.version,
                        location=checkpoint.location,
                        base=checkpoint.base,
                        job=row.id,
                        parents=dict(checkpoint.parents),
                        num_bytes=checkpoint.num_bytes,
                        created_at=checkpoint.created_at,
                    )
                )

    @contextmanager
    def _held(self, job: MergeJob) -> Iterator[tuple[Session, MergeRow]]:
        with self._database.alone() as session:
            row = session.get(MergeRow, job.id)
            if row is None or row.fence != job.fence or row.state in ENDED:
                raise LeaseLost(f"{job.id} is in other hands by now.", job=job.id)
            yield session, row


def _under_way(session: Session, name: str, target: str) -> MergeRow | None:
    wanted = select(MergeRow).where(MergeRow.name == name, MergeRow.target == target, MergeRow.state.not_in(ENDED))
    return session.scalars(wanted).first()


def _row(session: Session, identifier: str) -> MergeRow:
    row = session.get(MergeRow, identifier)
    if row is None:
        raise NotFound(f"There is no merge '{identifier[:64]}'.", near=[])
    return row


def _say(session: Session, row: MergeRow, message: str, level: str = "info") -> None:
    session.add(MergeLogRow(job=row.id, at=datetime.now(UTC), level=level, message=message))


def _job(row: MergeRow) -> MergeJob:
    return MergeJob(
        id=row.id,
        name=row.name,
        target=row.target,
        state=MergeState(row.state),
        plan=dict(row.plan),
        plan_id=row.plan_id,
        actor=row.actor,
        created_at=aware(row.created_at),
        started_at=None if row.started_at is None else aware(row.started_at),
        ended_at=None if row.ended_at is None else aware(row.ended_at),
        trials=tuple(row.trials),
        report=None if row.report is None else dict(row.report),
        error=row.error,
        is_cancelled=row.is_cancelled,
        fence=row.fence,
    )


def _unit(row: MergeUnitRow) -> MergeUnit:
    return MergeUnit(
        unit=row.unit,
        kind=row.kind,
        num_bytes=row.num_bytes,
        state=row.state,
        done_bytes=row.done_bytes,
        node=row.node,
        seconds=row.seconds,
        peak_bytes=row.peak_bytes,
    )


def _checkpoint(row: CheckpointRow) -> Checkpoint:
    return Checkpoint(
        name=row.name,
        version=row.version,
        location=row.location,
        base=row.base,
        job=row.job,
        parents=dict(row.parents),
        num_bytes=row.num_bytes,
        created_at=aware(row.created_at),
    )
