"""An experiment as the registry keeps it: plain values."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum

from serve.experiments.definition import Allocation, Arm, Plan


class State(StrEnum):
    """Where an experiment is in its life."""

    DRAFT = "draft"
    SHADOW = "shadow"
    RAMPING = "ramping"
    RUNNING = "running"
    PAUSED = "paused"
    DECIDED = "decided"
    PROMOTED = "promoted"
    ROLLED_BACK = "rolled_back"
    ARCHIVED = "archived"


LIVE = frozenset({State.SHADOW, State.RAMPING, State.RUNNING, State.PAUSED, State.DECIDED})
"""States in which an experiment owns its alias."""
COLLECTING = frozenset({State.RAMPING, State.RUNNING})
"""States in which what happens counts as evidence."""
DIVIDING = COLLECTING | {State.DECIDED}
"""States in which units get their arms."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """A time in which one allocation held; evidence never crosses its border.

    ``drawn``: the number of the phase that units were drawn in; a later one may keep its draw. ``coverage``: the share
    of units that is let in now, which rises towards the allocation's. Arms' targets are exact.
    """

    number: int
    drawn: int
    allocation: Allocation
    coverage: float
    opened_at: datetime
    closed_at: datetime | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """``since``: when it came into its state, or, ramping, to its coverage. ``layer``: the part of its layer that it
    has. ``resumes_to``: what a paused one goes on as. ``winner``: the arm that was decided on. ``replaced``: what the
    alias meant before it was promoted."""

    id: str
    plan: Plan
    state: State
    phase: Phase
    created_at: datetime
    since: datetime
    layer: tuple[float, float] | None = None
    resumes_to: State | None = None
    winner: str | None = None
    replaced: str | None = None

    @property
    def is_live(self) -> bool:
        return self.state in LIVE

    @property
    def control(self) -> Arm:
        arms = self.phase.allocation.arms
        return next((arm for arm in arms if arm.name == self.plan.control), arms[0])

    @property
    def treatments(self) -> tuple[Arm, ...]:
        """Arms that users may get and that are compared with control."""
        return tuple(arm for arm in self.phase.allocation.answering if arm.name != self.control.name)

    @property
    def shadows(self) -> tuple[Arm, ...]:
        """Arms that answer copies now: in the state ``shadow`` every arm that is not control."""
        if self.state is State.SHADOW:
            return tuple(arm for arm in self.phase.allocation.arms if arm.name != self.control.name)
        return tuple(arm for arm in self.phase.allocation.arms if arm.shadow) if self.state in COLLECTING else ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelAlias:
    """A model name that means ``target``, spelled exactly."""

    name: str
    target: str
    moved_at: datetime
