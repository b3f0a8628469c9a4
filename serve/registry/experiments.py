"""Model aliases and experiments of the registry, read and changed. What was seen in them is in ``trials.py``."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import delete, or_, select, update
from sqlalchemy.orm import Session

from lora_runtime.errors import Conflict, NotFound
from serve.experiments.definition import Allocation, Plan
from serve.experiments.phases import Action, allotted, moved
from serve.experiments.records import LIVE, Experiment, ModelAlias, Phase, State
from serve.registry.database import Database
from serve.registry.experiment_tables import ExperimentRow, ModelAliasRow, PhaseRow, UseRow
from serve.registry.repository import aware, note
from serve.registry.tables import VersionRow
from serve.targets import BASE, exact_members

Decide = Callable[[Experiment], Experiment]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """What requests need to know: every alias, and live experiments by theirs."""

    aliases: Mapping[str, ModelAlias]
    experiments: Mapping[str, Experiment]


class Experiments:
    """Every change is one transaction under the registry's lock, and leaves rows in the audit that say who and why."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def snapshot(self) -> Snapshot:
        with self._database.reading() as session:
            live = select(ExperimentRow).where(ExperimentRow.state.in_(LIVE))
            return Snapshot(
                aliases={row.name: _alias(row) for row in session.scalars(select(ModelAliasRow))},
                experiments={row.alias: _experiment(session, row) for row in session.scalars(live)},
            )

    def all(self) -> list[Experiment]:
        """Newest first."""
        with self._database.reading() as session:
            rows = session.scalars(select(ExperimentRow).order_by(ExperimentRow.created_at.desc(), ExperimentRow.id))
            return [_experiment(session, row) for row in rows]

    def get(self, name: str) -> Experiment:
        """By id or name. Raises NotFound."""
        with self._database.reading() as session:
            return _experiment(session, _row(session, name))

    def phases(self, identifier: str) -> list[Phase]:
        """All phases of an experiment, oldest first."""
        with self._database.reading() as session:
            wanted = select(PhaseRow).where(PhaseRow.experiment == identifier).order_by(PhaseRow.number)
            return [_phase(row) for row in session.scalars(wanted)]

    def create(self, plan: Plan, allocation: Allocation, *, actor: str) -> Experiment:
        """A draft. ``allocation``'s targets are exact. Raises Conflict for a name that is taken, NotFound."""
        now = datetime.now(UTC)
        phase = Phase(number=1, drawn=1, allocation=allocation, coverage=allocation.coverage, opened_at=now)
        made = Experiment(
            id=f"exp_{secrets.token_hex(8)}", plan=plan, state=State.DRAFT, phase=phase, created_at=now, since=now
        )
        with self._database.changing() as session:
            _check_name(session, made)
            _save(session, made)
            note(session, actor, "experiment.create", made.id, name=plan.name, alias=plan.alias)
        return made

    def change(self, name: str, decide: Decide, *, actor: str, reason: str, **details: Any) -> Experiment:
        """What ``decide`` makes of an experiment, under the lock. Raises NotFound, and what ``decide`` raises."""
        with self._database.changing() as session:
            before = _experiment(session, _row(session, name))
            after = decide(before)
            _check_name(session, after)
            if after.phase.number != before.phase.number:
                session.execute(
                    update(PhaseRow)
                    .where(PhaseRow.experiment == before.id, PhaseRow.number == before.phase.number)
                    .values(closed_at=after.phase.opened_at)
                )
            _save(session, after)
            action = "experiment.phase" if after.phase.number != before.phase.number else "experiment.change"
            note(session, actor, action, before.id, reason=reason, **details, **_differences(before, after))
            return after

    def act(
        self, name: str, action: Action, *, actor: str, reason: str, arm: str | None = None, **details: Any
    ) -> Experiment:
        """Carry out an action, with what it does to the alias and the layer, all or nothing. Raises Conflict."""
        now = datetime.now(UTC)
        with self._database.changing() as session:
            before = _experiment(session, _row(session, name))
            after = moved(before, action, now, arm=arm)
            if after.is_live and not before.is_live:
                after = _entered(session, after, actor)
            if action is Action.PROMOTE:
                after = _promoted(session, after, actor)
            if action is Action.ROLL_BACK and before.state is State.PROMOTED:
                _restored(session, before, actor)
            _save(session, after)
            note(
                session,
                actor,
                f"experiment.{action}",
                before.id,
                reason=reason,
                before=str(before.state),
                after=str(after.state),
                **({"arm": arm} if arm else {}),
                **details,
            )
            return after

    def remove(self, name: str, *, actor: str) -> Experiment:
        """Forget a draft. Raises NotFound, or Conflict for one that began."""
        with self._database.changing() as session:
            found = _experiment(session, _row(session, name))
            if found.state is not State.DRAFT:
                raise Conflict(f"The experiment is {found.state}; only a draft can be deleted. Archive it instead.")
            _hold(session, f"experiment/{found.id}", ())
            note(session, actor, "experiment.delete", found.id, name=found.plan.name)
            session.flush()
            session.execute(delete(ExperimentRow).where(ExperimentRow.id == found.id))
            return found

    def set_alias(self, name: str, target: str, *, actor: str) -> ModelAlias:
        """Let a model name mean ``target``, spelled exactly. Raises NotFound, Conflict while an experiment owns it."""
        with self._database.changing() as session:
            _check_free(session, name)
            return _alias(_point(session, name, target, actor))

    def remove_alias(self, name: str, *, actor: str) -> None:
        """Forget a model alias. Raises NotFound, or Conflict while an experiment owns it."""
        with self._database.changing() as session:
            row = session.get(ModelAliasRow, name)
            if row is None:
                raise NotFound(f"There is no model alias '{name[:128]}'.", near=[])
            _check_free(session, name)
            note(session, actor, "model.delete", name, before=row.target)
            _hold(session, f"alias/{name}", ())
            session.delete(row)

    def claim(self, identifier: str, every_s: float) -> bool:
        """Whether it is the caller's turn to look at an experiment: one caller's in ``every_s``."""
        now = datetime.now(UTC)
        every = timedelta(seconds=every_s)
        looked_at = ExperimentRow.looked_at
        # A look in the future was made before the clock was set back.
        due = or_(looked_at.is_(None), looked_at <= now - every, looked_at > now + every)
        with self._database.adding() as session:
            claimed = session.execute(
                update(ExperimentRow)
                .where(ExperimentRow.id == identifier, due)
                .values(looked_at=now)
                .returning(ExperimentRow.id)
            )
            return claimed.first() is not None


def _entered(session: Session, experiment: Experiment, actor: str) -> Experiment:
    """Take the alias, and a part of the layer."""
    plan = experiment.plan
    _check_free(session, plan.alias)
    if session.get(ModelAliasRow, plan.alias) is None:
        _point(session, plan.alias, experiment.control.target, actor)
    if plan.layer is None:
        return experiment
    wanted = select(ExperimentRow.layer_start, ExperimentRow.layer_end).where(
        ExperimentRow.layer == plan.layer.name, ExperimentRow.state.in_(LIVE)
    )
    taken = [(start, end) for start, end in session.execute(wanted) if start is not None and end is not None]
    return replace(experiment, layer=allotted(plan.layer.name, taken, plan.layer.share))


def _promoted(session: Session, experiment: Experiment, actor: str) -> Experiment:
    """Let the alias mean the winner."""
    arm = experiment.phase.allocation.arm(experiment.winner or "")
    alias = session.get(ModelAliasRow, experiment.plan.alias)
    if arm is None or alias is None:
        raise Conflict("The winner or the alias is gone; roll the experiment back.")
    before = alias.target
    _point(session, experiment.plan.alias, arm.target, actor)
    return replace(experiment, replaced=before)


def _restored(session: Session, experiment: Experiment, actor: str) -> None:
    """Let the alias mean again what it meant before the promotion."""
    arm = experiment.phase.allocation.arm(experiment.winner or "")
    alias = session.get(ModelAliasRow, experiment.plan.alias)
    _check_free(session, experiment.plan.alias)
    if alias is None or arm is None or alias.target != arm.target:
        raise Conflict(f"'{experiment.plan.alias}' was moved since it was promoted; set the alias itself.")
    _point(session, experiment.plan.alias, experiment.replaced or BASE, actor)


def _check_free(session: Session, alias: str) -> None:
    wanted = select(ExperimentRow.name).where(ExperimentRow.alias == alias, ExperimentRow.state.in_(LIVE))
    if (owner := session.scalar(wanted)) is not None:
        raise Conflict(f"The experiment '{owner}' owns '{alias}' now; promote it or roll it back first.", owner=owner)


def _check_name(session: Session, experiment: Experiment) -> None:
    wanted = select(ExperimentRow.id).where(
        ExperimentRow.name == experiment.plan.name, ExperimentRow.id != experiment.id
    )
    if session.scalar(wanted) is not None:
        raise Conflict(f"There is an experiment '{experiment.plan.name}' already; choose another name.")


def _point(session: Session, name: str, target: str, actor: str) -> ModelAliasRow:
    row = session.get(ModelAliasRow, name)
    before = None if row is None else row.target
    if row is None:
        row = ModelAliasRow(name=name, target=target, moved_at=datetime.now(UTC))
        session.add(row)
    if before != target:
        row.target, row.moved_at = target, datetime.now(UTC)
        _hold(session, f"alias/{name}", (target,))
        note(session, actor, "model.move", name, before=before, after=target)
    return row


def _hold(session: Session, owner: str, targets: Iterable[str]) -> None:
    """Keep what ``targets`` name, and nothing else, from deletion. Raises NotFound for what is gone already."""
    wanted = {(member.name, member.version) for target in targets for member in exact_members(target)}
    for adapter, version in wanted:
        if version is None or session.get(VersionRow, (adapter, version)) is None:
            raise NotFound(f"'{adapter}@{(version or '')[:12]}' was deleted meanwhile.", near=[])
    session.execute(delete(UseRow).where(UseRow.owner == owner))
    session.add_all(UseRow(owner=owner, adapter=adapter, version=version) for adapter, version in wanted)
    session.flush()


def _save(session: Session, experiment: Experiment) -> None:
    row = session.get(ExperimentRow, experiment.id)
    if row is None:
        row = ExperimentRow(id=experiment.id, created_at=experiment.created_at)
    layer = experiment.plan.layer
    row.name, row.alias = experiment.plan.name, experiment.plan.alias
    row.state, row.since = experiment.state, experiment.since
    row.plan = experiment.plan.model_dump(mode="json")
    row.layer = layer.name if layer is not None and experiment.layer is not None else None
    row.layer_start, row.layer_end = experiment.layer or (None, None)
    row.resumes_to, row.winner, row.replaced = experiment.resumes_to, experiment.winner, experiment.replaced
    session.add(row)
    session.flush()
    phase = experiment.phase
    session.merge(
        PhaseRow(
            experiment=experiment.id,
            number=phase.number,
            drawn=phase.drawn,
            allocation=phase.allocation.model_dump(mode="json", exclude_unset=True),
            coverage=phase.coverage,
            opened_at=phase.opened_at,
            closed_at=phase.closed_at,
        )
    )
    meant = {arm.target for arm in phase.allocation.arms} | ({experiment.replaced} if experiment.replaced else set())
    _hold(session, f"experiment/{experiment.id}", () if experiment.state is State.ARCHIVED else meant)


def _differences(before: Experiment, after: Experiment) -> dict[str, Any]:
    """What changed, as it was and is."""
    old = {**before.plan.model_dump(mode="json"), **before.phase.allocation.model_dump(mode="json")}
    new = {**after.plan.model_dump(mode="json"), **after.phase.allocation.model_dump(mode="json")}
    old["phase"], new["phase"] = before.phase.number, after.phase.number
    old["covers"], new["covers"] = before.phase.coverage, after.phase.coverage
    names = [name for name in new if old.get(name) != new[name]]
    return {"before": {name: old.get(name) for name in names}, "after": {name: new[name] for name in names}}


def _row(session: Session, name: str) -> ExperimentRow:
    wanted = select(ExperimentRow).where(or_(ExperimentRow.id == name, ExperimentRow.name == name))
    row = session.scalars(wanted.order_by(ExperimentRow.id != name)).first()
    if row is None:
        raise NotFound(f"There is no experiment '{name[:64]}'.", near=[])
    return row


def _experiment(session: Session, row: ExperimentRow) -> Experiment:
    wanted = select(PhaseRow).where(PhaseRow.experiment == row.id).order_by(PhaseRow.number.desc()).limit(1)
    start, end = row.layer_start, row.layer_end
    return Experiment(
        id=row.id,
        plan=Plan.model_validate(row.plan),
        state=State(row.state),
        phase=_phase(session.scalars(wanted).one()),
        created_at=aware(row.created_at),
        since=aware(row.since),
        layer=None if start is None or end is None else (start, end),
        resumes_to=None if row.resumes_to is None else State(row.resumes_to),
        winner=row.winner,
        replaced=row.replaced,
    )


def _phase(row: PhaseRow) -> Phase:
    return Phase(
        number=row.number,
        drawn=row.drawn,
        allocation=Allocation.model_validate(row.allocation),
        coverage=row.coverage,
        opened_at=aware(row.opened_at),
        closed_at=row.closed_at and aware(row.closed_at),
    )


def _alias(row: ModelAliasRow) -> ModelAlias:
    return ModelAlias(name=row.name, target=row.target, moved_at=aware(row.moved_at))
