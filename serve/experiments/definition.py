"""What an experiment is said to be: arms, metrics, guardrails and the analysis, checked as a whole.

These are the bodies of the API, the registry's JSON, and the values that everything else here works on.
"""

from __future__ import annotations

import math
import re
from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

ERROR_RATE = "error_rate"
FIRST_TOKEN = "ttft"
TOKEN_TIME = "time_per_token"
MEASURED = frozenset({ERROR_RATE, FIRST_TOKEN, TOKEN_TIME})
"""Metrics that every experiment has, without feedback: measured at the gateway, lower is better."""

MAX_ARMS = 10
MAX_METRICS = 20
DEFAULT_STEPS = (0.01, 0.05, 0.1, 0.25, 0.5, 1.0)

NAME_PATTERN = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
Name = Annotated[str, Field(pattern=NAME_PATTERN, max_length=64)]
Limit = Annotated[float, Field(ge=-1e9, le=1e9, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
_ATTRIBUTE = re.compile(r"tenant|has_image|language|(header|metadata)\.[A-Za-z0-9_-]{1,64}")


class Part(BaseModel):
    """A piece of a definition: unknown fields are errors, and nothing is changed in place."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Arm(Part):
    """One of the things compared. ``target`` is spelled as a model name (``support@prod``, ``shape:0.7+french:0.3``,
    the base's name) and made exact when it is said: it means the same content ever after.

    Of units that are enrolled, ``weight`` over the sum of all weights get it. A ``shadow`` arm gets none: it answers
    copies of requests, and its answers are only compared.
    """

    name: Name
    target: str = Field(min_length=1, max_length=4096)
    weight: float = Field(default=1.0, ge=0, le=1e6, allow_inf_nan=False)
    shadow: bool = False


class Metric(Part):
    """An outcome that feedback reports. ``direction``: which way is better.

    ``level``, what its mean is over: ``unit``, of all exposed units, where one without feedback counts as 0 and one
    with several as their sum (of bools: whether any was true); ``request``, of all requests, with 0 for none;
    ``feedback``, of what was reported. The last two are ratios, whose variance is between units.

    ``cap`` and ``floor``: a unit's mean at its level counts as no more, and no less (winsorising at values that are
    declared before the data). A few very large values decide a mean and hide all else; capped, what they say is
    bounded, and so is what a difference can be.
    """

    name: str = Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")
    kind: Literal["bool", "float"] = "bool"
    direction: Literal["up", "down"] = "up"
    level: Literal["unit", "request", "feedback"] = "feedback"
    cap: Limit | None = None
    floor: Limit | None = None

    @model_validator(mode="after")
    def _limits_of_numbers(self) -> Metric:
        if self.kind == "bool" and (self.cap is not None or self.floor is not None):
            raise ValueError("'cap' and 'floor' are for metrics of the kind 'float'")
        if self.cap is not None and self.floor is not None and self.floor >= self.cap:
            raise ValueError("'floor' must be below 'cap'")
        if self.level != "feedback" and not (self.floor or -1.0) <= 0 <= (self.cap or 1.0):
            raise ValueError("units and requests without feedback count as 0, which must lie from 'floor' to 'cap'")
        return self


class Guardrail(Part):
    """Ends harm by itself: when an arm is worse than control in ``metric`` by more than ``tolerance``, with the
    confidence 1 - ``alpha`` at any time, ``action`` is taken. An experiment's guardrails are one family: the confidence
    is of all of them together.

    ``tolerance`` is relative for times (0.1: ten per cent slower), and absolute for all others.
    """

    metric: str = Field(min_length=1, max_length=64)
    tolerance: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    action: Literal["pause", "roll_back", "alert"] = "pause"
    alpha: float = Field(default=0.05, gt=0, lt=0.5, allow_inf_nan=False)


class Analysis(Part):
    """``sequential`` may be looked at any time; ``units`` is when a decision is expected, where its intervals are
    narrowest. ``fixed`` says nothing before ``units`` have data in the decision metric, and then once.

    No arm is judged before ``min_units`` of it and of control have data.

    ``goal``, what an arm must be to win in the decision metric: ``better`` than control; ``not_worse`` than it by
    ``margin``; or ``equivalent``, neither better nor worse by as much. ``margin`` is relative for times (0.1: ten per
    cent slower), and absolute for all others.
    """

    kind: Literal["sequential", "fixed"] = "sequential"
    goal: Literal["better", "not_worse", "equivalent"] = "better"
    margin: float | None = Field(default=None, gt=0, le=1e9, allow_inf_nan=False)
    alpha: float = Field(default=0.05, gt=0, lt=0.5, allow_inf_nan=False)
    units: int = Field(default=5000, ge=10, le=1_000_000_000)
    min_units: int = Field(default=100, ge=10, le=1_000_000)

    @model_validator(mode="after")
    def _margin_for_its_goals(self) -> Analysis:
        if (self.margin is None) != (self.goal == "better"):
            raise ValueError("'margin' is how much worse is borne: give it for the goals 'not_worse' and 'equivalent'")
        return self


class Ramp(Part):
    """Coverage while ``ramping``: each of ``steps`` for ``every_s``, as long as no guardrail and no mismatch speaks
    against the next."""

    steps: tuple[Share, ...] = Field(fail_fast=True, default=DEFAULT_STEPS, min_length=1, max_length=50)
    every_s: float = Field(default=3600.0, gt=0, allow_inf_nan=False)

    @field_validator("steps")
    @classmethod
    def _rising(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if any(later <= earlier for earlier, later in pairwise(value)):
            raise ValueError("each step must cover more than the one before it")
        return value


class Layer(Part):
    """Experiments of one layer share no unit: each has ``share`` of it for itself while it lives."""

    name: Name
    share: Share


class Condition(Part):
    """Which requests take part: those whose ``attribute`` is ``any_of`` some values, or ``none_of`` them.

    Attributes: ``tenant`` (an API key's id or name), ``has_image`` (``true`` or ``false``), ``language`` (``de``),
    and ``header.x-plan`` or ``metadata.plan`` where the configuration allows that name.
    """

    attribute: str = Field(max_length=80)
    any_of: tuple[str, ...] = Field(fail_fast=True, default=(), max_length=100)
    none_of: tuple[str, ...] = Field(fail_fast=True, default=(), max_length=100)

    @model_validator(mode="after")
    def _one_list_of_a_known_attribute(self) -> Condition:
        if not _ATTRIBUTE.fullmatch(self.attribute):
            raise ValueError("'attribute' must be tenant, has_image, language, header.NAME or metadata.NAME")
        if bool(self.any_of) == bool(self.none_of):
            raise ValueError("give either 'any_of' or 'none_of'")
        return self


class Shadow(Part):
    """What shadow arms see: ``share`` of requests. ``store_prompts``: whether the question is kept beside both
    answers."""

    share: Share = 0.1
    store_prompts: bool = False


class Allocation(Part):
    """Who takes part and who gets what. A change of it opens a new phase, but for more coverage or fewer conditions."""

    arms: tuple[Arm, ...] = Field(fail_fast=True, min_length=2, max_length=MAX_ARMS)
    coverage: Share = 1.0
    conditions: tuple[Condition, ...] = Field(fail_fast=True, default=(), max_length=20)

    @model_validator(mode="after")
    def _sound(self) -> Allocation:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError("two arms have one name")
        if any(arm.shadow and "weight" in arm.model_fields_set and arm.weight for arm in self.arms):
            raise ValueError("a shadow arm has no weight: it answers no user")
        if not math.fsum(arm.weight for arm in self.arms if not arm.shadow):
            raise ValueError("the weights of the arms sum to 0; give at least one of them more")
        return self

    @property
    def answering(self) -> tuple[Arm, ...]:
        """Arms that users may get."""
        return tuple(arm for arm in self.arms if not arm.shadow and arm.weight > 0)

    def arm(self, name: str) -> Arm | None:
        return next((arm for arm in self.arms if arm.name == name), None)


class Plan(Part):
    """Everything about an experiment that was declared before it began, but for its allocation."""

    name: Name
    alias: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}$")
    description: str = Field(default="", max_length=4096)
    control: Name | None = None
    metrics: tuple[Metric, ...] = Field(fail_fast=True, default=(), max_length=MAX_METRICS)
    decision_metric: str = Field(default=ERROR_RATE, max_length=64)
    guardrails: tuple[Guardrail, ...] = Field(
        fail_fast=True, default=(Guardrail(metric=ERROR_RATE, tolerance=0.02),), max_length=20
    )
    analysis: Analysis = Analysis()
    ramp: Ramp = Ramp()
    layer: Layer | None = None
    shadow: Shadow = Shadow()
    feedback_window_s: float = Field(default=7 * 86400.0, gt=0, le=366 * 86400.0)

    @model_validator(mode="after")
    def _metrics_are_known(self) -> Plan:
        names = [metric.name for metric in self.metrics]
        if len(set(names)) < len(names):
            raise ValueError("two metrics have one name")
        if taken := MEASURED & set(names):
            raise ValueError(f"'{min(taken)}' is measured by itself and needs no declaration")
        known = MEASURED | set(names)
        for asked in (self.decision_metric, *(guardrail.metric for guardrail in self.guardrails)):
            if asked not in known:
                raise ValueError(f"'{asked[:64]}' is no declared metric; there are {', '.join(sorted(known))}")
        return self

    def metric(self, name: str) -> Metric | None:
        """One that feedback may report."""
        return next((metric for metric in self.metrics if metric.name == name), None)

    def is_better_up(self, metric: str) -> bool:
        declared = self.metric(metric)
        return declared is not None and declared.direction == "up"


class Definition(Plan, Allocation):
    """An experiment as it is created. ``control``, the first arm if not given, is what others are compared with."""

    @model_validator(mode="after")
    def _control_answers(self) -> Definition:
        if self.control_name not in {arm.name for arm in self.answering}:
            raise ValueError(f"the control '{self.control_name}' must be an arm with a weight, and no shadow")
        if len(self.answering) < 2 and not any(arm.shadow for arm in self.arms):
            raise ValueError("there must be a second arm with a weight, or a shadow arm")
        return self

    @property
    def control_name(self) -> str:
        return self.control or self.arms[0].name
