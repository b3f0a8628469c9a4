"""Model aliases, experiments and feedback: bodies beside the definition itself."""

from __future__ import annotations

from datetime import datetime
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, StrictBool

from serve.experiments.definition import (
    Analysis,
    Arm,
    Condition,
    Definition,
    Guardrail,
    Layer,
    Metric,
    Name,
    Ramp,
    Shadow,
    Share,
)
from serve.experiments.phases import possible
from serve.experiments.planning import Forecast
from serve.experiments.records import Experiment, ModelAlias, Phase, State
from serve.experiments.results import Results
from serve.schemas.common import Body, Items

EXAMPLE: dict[str, Any] = {
    "name": "tone-of-voice",
    "alias": "support",
    "arms": [
        {"name": "control", "target": "support@prod"},
        {"name": "warmer", "target": "support@prod:0.8+tone:0.2"},
    ],
    "metrics": [{"name": "solved", "kind": "bool"}],
    "decision_metric": "solved",
    "guardrails": [{"metric": "error_rate", "tolerance": 0.01, "action": "roll_back"}],
}


class NewExperiment(Definition):
    """An experiment, as a draft; ``alias`` is the model name that it will own."""

    model_config = ConfigDict(json_schema_extra={"examples": [EXAMPLE]})


class ExperimentChange(Body):
    """What is to be said anew; fields that are not sent stay. ``new_phase``: for what changes who gets what, evidence
    begins anew; ``redraw``: and units are drawn anew, where else each stays in its arm as far as weights let it."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"coverage": 0.5, "reason": "quiet so far"}]})

    name: Name | None = None
    alias: str | None = Field(default=None, max_length=128)
    description: str | None = Field(default=None, max_length=4096)
    control: Name | None = None
    arms: Items[Arm] | None = None
    coverage: Share | None = None
    conditions: Items[Condition] | None = None
    metrics: Items[Metric] | None = None
    decision_metric: str | None = None
    guardrails: Items[Guardrail] | None = None
    analysis: Analysis | None = None
    ramp: Ramp | None = None
    layer: Layer | None = None
    shadow: Shadow | None = None
    feedback_window_s: float | None = Field(default=None, gt=0)
    new_phase: bool = False
    redraw: bool = False
    reason: str = Field(default="", max_length=1024)

    def changes(self) -> dict[str, Any]:
        """Fields of a Definition that are to be other; ``layer`` may be set to null."""
        said = self.model_dump(mode="json", exclude_unset=True, exclude={"new_phase", "redraw", "reason"})
        return {name: value for name, value in said.items() if value is not None or name == "layer"}


class ActionRequest(Body):
    """``arm``: what is decided on. ``despite_mismatch``: decide though shares are not what was planned."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"reason": "better in two weeks of data"}]})

    reason: str = Field(default="", max_length=1024)
    arm: Name | None = None
    despite_mismatch: bool = False


class ModelAliasRequest(Body):
    """What a model name is to mean: a spelling of a target, made exact now."""

    model_config = ConfigDict(json_schema_extra={"examples": [{"target": "shape:0.7+french:0.3"}]})

    target: str = Field(min_length=1, max_length=4096)


class ModelAliasAnswer(BaseModel):
    """``target`` is exact: versions in full. ``experiment``: the id of the one that owns the alias now."""

    id: str
    object: Literal["alias"] = "alias"
    target: str
    moved: datetime
    experiment: str | None

    @classmethod
    def of(cls, alias: ModelAlias, owner: Experiment | None) -> ModelAliasAnswer:
        experiment = None if owner is None else owner.id
        return cls(id=alias.name, target=alias.target, moved=alias.moved_at, experiment=experiment)


class ModelAliasList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelAliasAnswer]


class PhaseAnswer(BaseModel):
    """``coverage``: the share of units that is let in now. ``drawn``: the phase whose draw it keeps."""

    number: int
    drawn: int
    coverage: float
    planned_coverage: float
    arms: list[Arm]
    conditions: list[Condition]
    opened: datetime
    closed: datetime | None

    @classmethod
    def of(cls, phase: Phase) -> PhaseAnswer:
        return cls(
            number=phase.number,
            drawn=phase.drawn,
            coverage=phase.coverage,
            planned_coverage=phase.allocation.coverage,
            arms=list(phase.allocation.arms),
            conditions=list(phase.allocation.conditions),
            opened=phase.opened_at,
            closed=phase.closed_at,
        )


class ExperimentAnswer(BaseModel):
    """``actions``: what can be done to it now. ``layer_range``: the part of its layer that it has."""

    id: str
    object: Literal["experiment"] = "experiment"
    name: str
    alias: str
    state: State
    actions: list[str]
    description: str
    control: str
    phase: PhaseAnswer
    metrics: list[Metric]
    decision_metric: str
    guardrails: list[Guardrail]
    analysis: Analysis
    ramp: Ramp
    layer: Layer | None
    layer_range: tuple[float, float] | None
    shadow: Shadow
    feedback_window_s: float
    winner: str | None
    created: datetime
    since: datetime

    @classmethod
    def of(cls, experiment: Experiment) -> ExperimentAnswer:
        plan = experiment.plan
        return cls(
            id=experiment.id,
            name=plan.name,
            alias=plan.alias,
            state=experiment.state,
            actions=[str(action) for action in possible(experiment.state)],
            description=plan.description,
            control=experiment.control.name,
            phase=PhaseAnswer.of(experiment.phase),
            metrics=list(plan.metrics),
            decision_metric=plan.decision_metric,
            guardrails=list(plan.guardrails),
            analysis=plan.analysis,
            ramp=plan.ramp,
            layer=plan.layer,
            layer_range=experiment.layer,
            shadow=plan.shadow,
            feedback_window_s=plan.feedback_window_s,
            winner=experiment.winner,
            created=experiment.created_at,
            since=experiment.since,
        )


class ExperimentList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ExperimentAnswer]


class LookAnswer(BaseModel):
    """Results as they were at a time, as far as pictures need them."""

    as_of: datetime
    units: dict[str, int]
    effects: dict[str, dict[str, tuple[float, float, float]]]
    """By metric and arm: low, estimate, high."""


class ResultsAnswer(BaseModel):
    """Results now, and ``looks`` at them before, oldest first."""

    object: Literal["experiment.results"] = "experiment.results"
    name: str
    alias: str
    results: Results
    looks: list[LookAnswer]


class ForecastAnswer(BaseModel):
    """What it takes to see an effect."""

    object: Literal["experiment.plan"] = "experiment.plan"
    name: str
    plan: Forecast


class AssignmentAnswer(BaseModel):
    """The arm of a unit whose requests meet the conditions; null for who is not enrolled."""

    object: Literal["experiment.assignment"] = "experiment.assignment"
    phase: int
    unit: str
    arm: str | None


class PairAnswer(BaseModel):
    """One question's two answers."""

    id: int
    request_id: str
    phase: int
    served: str
    shadow: str
    prompt: str | None
    answer: str
    shadow_answer: str
    at: datetime


class PairList(BaseModel):
    """Newest first. ``has_more``: ask again with ``before`` the last one's id."""

    object: Literal["list"] = "list"
    data: list[PairAnswer]
    has_more: bool


class FeedbackRequest(Body):
    """What came of a request: a ``value`` of a metric that its experiment declared.

    ``request_id``: the answer's ``X-Request-Id``, or its ``id``. ``idempotency_key``: a report that is sent again
    counts once; without one there is one value of each metric and request.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {"request_id": "chatcmpl-5f3a", "metric": "solved", "value": True, "idempotency_key": "ticket-8812"}
            ]
        }
    )

    request_id: str = Field(min_length=1, max_length=160)
    metric: str = Field(min_length=1, max_length=64)
    value: StrictBool | FiniteFloat
    idempotency_key: str = Field(default="", max_length=255)


class FeedbackAnswer(BaseModel):
    """``counts``: whether it is evidence; what was forced, fell back, or came without a unit is kept, and is not.
    ``repeated``: it had been reported before."""

    object: Literal["feedback"] = "feedback"
    request_id: str
    metric: str
    counts: bool
    repeated: bool
