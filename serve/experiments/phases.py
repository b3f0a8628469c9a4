"""What may happen to an experiment, and when: its life, its changes, its share of a layer. Decides; changes nothing."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from datetime import datetime
from enum import StrEnum
from typing import Any

from lora_runtime.errors import Conflict
from serve.experiments.definition import Allocation, Plan
from serve.experiments.records import Experiment, Phase, State


class Action(StrEnum):
    """What can be done to an experiment."""

    SHADOW = "shadow"
    RAMP = "ramp"
    RUN = "run"
    PAUSE = "pause"
    RESUME = "resume"
    DECIDE = "decide"
    PROMOTE = "promote"
    ROLL_BACK = "roll_back"
    ARCHIVE = "archive"


_TO: dict[Action, tuple[frozenset[State], State | None]] = {
    Action.SHADOW: (frozenset({State.DRAFT}), State.SHADOW),
    Action.RAMP: (frozenset({State.DRAFT, State.SHADOW}), State.RAMPING),
    Action.RUN: (frozenset({State.DRAFT, State.SHADOW, State.RAMPING}), State.RUNNING),
    Action.PAUSE: (frozenset({State.SHADOW, State.RAMPING, State.RUNNING}), State.PAUSED),
    Action.RESUME: (frozenset({State.PAUSED}), None),
    Action.DECIDE: (frozenset({State.RAMPING, State.RUNNING, State.PAUSED}), State.DECIDED),
    Action.PROMOTE: (frozenset({State.DECIDED}), State.PROMOTED),
    Action.ROLL_BACK: (
        frozenset({State.SHADOW, State.RAMPING, State.RUNNING, State.PAUSED, State.DECIDED, State.PROMOTED}),
        State.ROLLED_BACK,
    ),
    Action.ARCHIVE: (frozenset({State.DRAFT, State.PROMOTED, State.ROLLED_BACK}), State.ARCHIVED),
}

LOCKED = ("name", "alias", "control", "decision_metric", "analysis")
"""Declared before the data; a change would make what was seen say something it was not asked."""


def possible(state: State) -> list[Action]:
    """What can be done from ``state``."""
    return [action for action, (sources, _) in _TO.items() if state in sources]


def moved(experiment: Experiment, action: Action, now: datetime, *, arm: str | None = None) -> Experiment:
    """The experiment after ``action``; ``arm`` is what is decided on. Raises Conflict."""
    sources, target = _TO[action]
    if experiment.state not in sources:
        raise Conflict(
            f"An experiment that is {experiment.state} cannot {action.replace('_', ' ')}; it can "
            f"{', '.join(possible(experiment.state)) or 'do nothing any more'}.",
            state=str(experiment.state),
        )
    state = target or experiment.resumes_to or State.RUNNING
    found = replace(experiment, state=state, since=now, resumes_to=None)
    if action is Action.PAUSE:
        return replace(found, resumes_to=experiment.state)
    if action is Action.SHADOW and not found.shadows:
        raise Conflict("There is no arm beside control that could answer copies of requests.")
    if action in (Action.RAMP, Action.RUN) and len(found.phase.allocation.answering) < 2:
        raise Conflict("Only control answers users; give another arm a weight, in a draft or a new phase.")
    if action is Action.RAMP:
        return replace(found, phase=_covering(found.phase, experiment.plan.ramp.steps[0]))
    if action is Action.RUN:
        return replace(found, phase=_covering(found.phase, 1.0))
    if action is Action.DECIDE:
        return replace(_closed(found, now), winner=_decidable(experiment, arm))
    if action in (Action.PROMOTE, Action.ROLL_BACK, Action.ARCHIVE):
        return replace(_closed(found, now), layer=None)
    return found


def stepped(experiment: Experiment, now: datetime) -> Experiment | None:
    """A ramping experiment at its next coverage, or running after its last; None before its time."""
    ramp, phase = experiment.plan.ramp, experiment.phase
    if experiment.state is not State.RAMPING or (now - experiment.since).total_seconds() < ramp.every_s:
        return None
    ahead = next((step for step in ramp.steps if step > phase.coverage), None)
    if ahead is None or phase.coverage >= phase.allocation.coverage:
        return replace(experiment, state=State.RUNNING, since=now, phase=_covering(phase, 1.0))
    return replace(experiment, since=now, phase=_covering(phase, ahead))


def redefined(experiment: Experiment, plan: Plan, allocation: Allocation) -> Experiment:
    """A draft as it is said anew. Raises Conflict where it is none any more."""
    if experiment.state is not State.DRAFT:
        raise Conflict(f"The experiment is {experiment.state}, and no draft any more.")
    phase = replace(experiment.phase, allocation=allocation, coverage=allocation.coverage)
    return replace(experiment, plan=plan, phase=phase)


def amended(
    experiment: Experiment, plan: Plan, allocation: Allocation, now: datetime, *, new_phase: bool, redraw: bool
) -> Experiment:
    """A live experiment with another plan and allocation. Raises Conflict that says what cannot be and why.

    In place: more coverage, fewer conditions, leaving the layer, other shadow arms; and of the plan all that is not
    the question itself. Anything else about who gets what needs ``new_phase``; ``redraw``: units are drawn anew in it.
    """
    if not experiment.is_live or experiment.state is State.DECIDED:
        raise Conflict(f"The experiment is {experiment.state}; nothing about it changes any more.")
    _check_plan(experiment.plan, plan)
    before = experiment.phase
    reasons = _reasons(before.allocation, allocation)
    if reasons and not new_phase:
        raise Conflict(
            f"{reasons[0]}. That needs a new phase, whose evidence begins at nothing: send it with 'new_phase': true.",
            reasons=reasons,
        )
    layer = experiment.layer if plan.layer is not None else None
    if not new_phase:
        coverage = before.coverage
        if experiment.state is not State.RAMPING:
            coverage = allocation.coverage
        return replace(
            experiment, plan=plan, layer=layer, phase=replace(before, allocation=allocation, coverage=coverage)
        )
    number = before.number + 1
    phase = Phase(
        number=number,
        drawn=number if redraw else before.drawn,
        allocation=allocation,
        coverage=min(before.coverage, allocation.coverage)
        if experiment.state is State.RAMPING
        else allocation.coverage,
        opened_at=now,
    )
    return replace(experiment, plan=plan, layer=layer, phase=phase)


def allotted(layer: str, taken: Iterable[tuple[float, float]], share: float) -> tuple[float, float]:
    """The first free part of a layer that is wide enough. Raises Conflict."""
    position, widest = 0.0, 0.0
    for start, end in [*sorted(taken), (1.0, 1.0)]:
        gap = start - position
        if gap >= share - 1e-12:
            return position, min(position + share, 1.0)
        widest = max(widest, gap)
        position = max(position, end)
    raise Conflict(
        f"The layer '{layer}' has {widest:.3g} in one piece left, and the experiment asks for {share:.3g}; wait until "
        "another of its experiments ends, or ask for less.",
        free=widest,
    )


def _check_plan(before: Plan, after: Plan) -> None:
    for field in LOCKED:
        if getattr(before, field) != getattr(after, field):
            raise Conflict(f"'{field}' was declared before the data came and stays; begin another experiment.")
    if after.layer not in (before.layer, None):
        raise Conflict("The layer is fixed at the start; an experiment can leave it, and join none.")
    for metric in before.metrics:
        if after.metric(metric.name) != metric:
            raise Conflict(f"The metric '{metric.name}' was declared before the data came and stays; others may join.")


def _reasons(before: Allocation, after: Allocation) -> list[str]:
    """Why ``after`` needs a new phase, in words; none where it can take the place of ``before``."""
    reasons = []
    if _divided(before) != _divided(after):
        reasons.append("Other arms, targets or weights move units from arm to arm")
    if after.coverage < before.coverage:
        reasons.append("Less coverage takes units out of their arms")
    if added := [c for c in after.conditions if c not in before.conditions]:
        reasons.append(f"The condition on '{added[0].attribute}' takes units out of their arms")
    return reasons


def _divided(allocation: Allocation) -> Any:
    return sorted((arm.name, arm.target, arm.weight) for arm in allocation.arms if not arm.shadow)


def _covering(phase: Phase, coverage: float) -> Phase:
    return replace(phase, coverage=min(coverage, phase.allocation.coverage))


def _closed(experiment: Experiment, now: datetime) -> Experiment:
    return replace(experiment, phase=replace(experiment.phase, closed_at=experiment.phase.closed_at or now))


def _decidable(experiment: Experiment, arm: str | None) -> str:
    names = [found.name for found in experiment.phase.allocation.arms]
    if arm not in names:
        raise Conflict(f"Say which 'arm' is decided on: {', '.join(names)}.", arms=names)
    return arm
