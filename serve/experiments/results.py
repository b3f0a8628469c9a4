"""What the analysis of an experiment says, as the API shows it and the registry keeps it. Plain values."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from serve.experiments.statistics import SRM_ALPHA

Verdict = Literal["better", "worse", "not_worse", "equivalent", "undecided", "too_few", "withheld"]
"""``better`` and ``worse`` in the metric's direction; ``not_worse`` and ``equivalent`` within the plan's margin, of the
decision metric. ``withheld``: shares are not as planned, so that a difference may come from who was counted."""

GuardState = Literal["breached", "kept", "uncertain", "too_few"]
"""``breached``: the harm exceeds the tolerance with confidence; ``kept``: it stays within it with confidence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricResult:
    """One metric in one arm. ``units`` with data, ``observations`` that the mean is over, ``mean`` (of times the
    geometric one, in seconds), and ``variance`` of a unit's contribution: over ``units`` it is the mean's (of times, of
    logarithms). ``kurtosis`` of the same, 3 for a normal distribution: where it is near the number of units, one unit
    makes up the variance."""

    units: int
    observations: float
    mean: float | None
    variance: float | None
    kurtosis: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """``means`` by metric; times are geometric means in seconds. ``planned_share`` of units. ``metrics``: what the
    means are of."""

    arm: str
    target: str
    units: int
    planned_share: float
    requests: int
    fallbacks: int
    cold_requests: int
    cold_ttft_s: float | None
    means: dict[str, float | None]
    metrics: dict[str, MetricResult] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm against control, with one interval that the verdict is read off.

    ``measure``: whether ``effect``, ``low`` and ``high`` are differences of means, or, of times, relative changes.
    ``relative``, with its own ``relative_low`` and ``relative_high``, is the effect over control's mean; both intervals
    leave 0 out together. ``confidence``: of this interval alone; ``family`` intervals of that confidence hold together
    at 1 - α of the plan. ``p_value`` is this comparison's alone, always valid where the analysis is sequential, and
    ``adjusted_p`` is for all of the family (Bonferroni's, as the intervals are). ``shrunken``: the effect without what
    stopping at a striking moment adds to it (sequential analysis only). ``units``: with data, of both arms.
    """

    metric: str
    arm: str
    measure: Literal["difference", "relative"] = "difference"
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    relative: float | None = None
    relative_low: float | None = None
    relative_high: float | None = None
    shrunken: float | None = None
    p_value: float | None = None
    adjusted_p: float | None = None
    confidence: float | None = None
    family: int = 1
    units: int = 0
    verdict: Verdict = "too_few"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Whether units came to the arms as planned. ``p_value`` is always valid, and the smallest there ever was."""

    p_value: float
    is_mismatch: bool
    alpha: float = SRM_ALPHA


@dataclass(frozen=True, slots=True, kw_only=True)
class Reporting:
    """Whether the arms' units report a metric equally often; where not, a mean over reports compares different people.
    ``rates``: units that reported over units exposed, by arm. ``p_value`` as that of :class:`Shares`."""

    metric: str
    rates: dict[str, float]
    p_value: float
    is_different: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardrailResult:
    """``harm``: how much worse than control, in the guardrail's own measure. With confidence it is ``at_least`` and
    ``at_most`` that much; each bound by itself holds at any time, at the guardrail's α over ``family``."""

    metric: str
    arm: str
    tolerance: float
    action: str
    harm: float | None
    at_least: float | None
    is_breached: bool
    at_most: float | None = None
    state: GuardState = "too_few"
    family: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Later:
    """Evidence that arrived after the results were settled: shown beside them, without any verdict."""

    as_of: datetime
    units: int
    arms: list[ArmResult]


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """``winner`` is None while nothing is decided, and where shares mismatch or a guardrail is breached for it.

    ``units`` were exposed; ``units_with_data`` of them have data in the decision metric. ``settled``: why these results
    stay as they are, with what came ``later``: a fixed analysis has reached its number, or the experiment was decided.
    """

    experiment: str
    phase: int
    state: str
    as_of: datetime
    analysis: str
    alpha: float
    decision_metric: str
    units: int
    needed_units: int | None
    control: str
    arms: list[ArmResult]
    comparisons: list[Comparison]
    shares: Shares
    guardrails: list[GuardrailResult]
    excluded: dict[str, int]
    switched_units: int
    winner: str | None
    note: str
    goal: str = "better"
    units_with_data: int = 0
    reporting: list[Reporting] = field(default_factory=list)
    settled: Literal["complete", "decided"] | None = None
    later: Later | None = None
