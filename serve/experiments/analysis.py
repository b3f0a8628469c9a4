"""What the evidence of a phase says: effects with their intervals, whether the shares are right, guardrails, a winner.

Looked at any number of times the sequential analysis errs in ``alpha`` of experiments at most; the fixed one says
nothing before its declared number of units. Where shares are not what was planned, no winner is named: what put the
units there may have made the difference, too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal

from serve.experiments.definition import FIRST_TOKEN, MEASURED, TOKEN_TIME, Guardrail, Plan
from serve.experiments.moments import Moments
from serve.experiments.records import Experiment
from serve.experiments.statistics import (
    SRM_ALPHA,
    Effect,
    Fixed,
    Sequential,
    Sums,
    effect_of,
    holm,
    mismatch_p_value,
)

LOGARITHMIC = frozenset({FIRST_TOKEN, TOKEN_TIME})
GUARD_MIN_UNITS = 20

Verdict = Literal["better", "worse", "undecided", "too_few"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvidence:
    """Of one arm: exposed units, requests, and sums over units for each metric. Cold requests had to wait for an
    adapter to be loaded; their times are in no metric."""

    units: int
    requests: int
    fallbacks: int = 0
    cold_requests: int = 0
    cold_ln_first_s: float | None = None
    metrics: Mapping[str, Sums | Moments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Of one phase, by arm. ``excluded``: requests that count for nothing, by kind. ``switched_units`` were seen in
    more than one arm, which should be none."""

    arms: Mapping[str, ArmEvidence]
    excluded: Mapping[str, int] = field(default_factory=dict)
    switched_units: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmResult:
    """``means`` by metric; times are geometric means in seconds. ``planned_share`` of units."""

    arm: str
    target: str
    units: int
    planned_share: float
    requests: int
    fallbacks: int
    cold_requests: int
    cold_ttft_s: float | None
    means: dict[str, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """An arm against control: the difference of means, or of times the relative change, with its interval.

    ``p_value`` is always valid where the analysis is sequential, and ``adjusted_p`` Holm's over the arms.
    """

    metric: str
    arm: str
    effect: float | None = None
    low: float | None = None
    high: float | None = None
    p_value: float | None = None
    adjusted_p: float | None = None
    units: int = 0
    verdict: Verdict = "too_few"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shares:
    """Whether units came to the arms as planned. ``p_value`` is always valid, and the smallest there ever was."""

    p_value: float
    is_mismatch: bool
    alpha: float = SRM_ALPHA


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardrailResult:
    """``harm``: how much worse than control, in the guardrail's own measure; ``at_least`` so with confidence."""

    metric: str
    arm: str
    tolerance: float
    action: str
    harm: float | None
    at_least: float | None
    is_breached: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Results:
    """``winner`` is None while nothing is decided, and where shares mismatch or a guardrail is breached for it."""

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


def results_of(experiment: Experiment, evidence: Evidence, as_of: datetime, *, lowest_p: float = 1.0) -> Results:
    """``lowest_p``: the smallest p-value of the shares at earlier looks; a mismatch that was seen stays seen."""
    plan, control = experiment.plan, experiment.control.name
    answering = experiment.phase.allocation.answering
    weights = [arm.weight for arm in answering]
    found = {arm.name: evidence.arms.get(arm.name, ArmEvidence(units=0, requests=0)) for arm in answering}
    counts = [found[arm.name].units for arm in answering]
    p_value = min(lowest_p, mismatch_p_value(counts, weights)) if len(answering) > 1 else 1.0
    shares = Shares(p_value=p_value, is_mismatch=p_value < SRM_ALPHA)
    treatments = [arm.name for arm in answering if arm.name != control]
    names = [plan.decision_metric, *sorted(({m.name for m in plan.metrics} | MEASURED) - {plan.decision_metric})]
    comparisons = [compared for name in names for compared in _comparisons(plan, name, found, control, treatments)]
    guardrails = [
        _guarded(plan, guardrail, arm, found, control, len(treatments))
        for guardrail in plan.guardrails
        for arm in treatments
    ]
    units = sum(counts)
    waiting = plan.analysis.kind == "fixed" and units < plan.analysis.units
    winner = None if shares.is_mismatch or waiting else _winner(plan, comparisons, guardrails, control)
    total = math.fsum(weights)
    return Results(
        experiment=experiment.id,
        phase=experiment.phase.number,
        state=str(experiment.state),
        as_of=as_of,
        analysis=plan.analysis.kind,
        alpha=plan.analysis.alpha,
        decision_metric=plan.decision_metric,
        units=units,
        needed_units=plan.analysis.units if plan.analysis.kind == "fixed" else None,
        control=control,
        arms=[
            ArmResult(
                arm=arm.name,
                target=arm.target,
                units=found[arm.name].units,
                planned_share=arm.weight / total,
                requests=found[arm.name].requests,
                fallbacks=found[arm.name].fallbacks,
                cold_requests=found[arm.name].cold_requests,
                cold_ttft_s=_exp(found[arm.name].cold_ln_first_s),
                means={name: _shown(name, _sums_of(found[arm.name], name).mean) for name in names},
            )
            for arm in answering
        ],
        comparisons=comparisons,
        shares=shares,
        guardrails=guardrails,
        excluded=dict(evidence.excluded),
        switched_units=evidence.switched_units,
        winner=winner,
        note=_note(plan, units, shares, winner, comparisons, guardrails),
    )


def _comparisons(
    plan: Plan, metric: str, arms: Mapping[str, ArmEvidence], control: str, treatments: list[str]
) -> list[Comparison]:
    """All arms against control in one metric, their intervals at α over their number: together they hold at α."""
    analysis = plan.analysis
    level = analysis.alpha / max(1, len(treatments))
    sequential, fixed = Sequential(analysis.units), Fixed()
    effects: dict[str, Effect] = {}
    for arm in treatments:
        pair = _sums_of(arms[arm], metric), _sums_of(arms[control], metric)
        effect = effect_of(*pair)
        if effect is not None and min(sums.n for sums in pair) >= analysis.min_units:
            effects[arm] = effect
    if analysis.kind == "fixed" and sum(arm.units for arm in arms.values()) < analysis.units:
        effects = {}
    p_values = {
        arm: sequential.p_value(effect, level) if analysis.kind == "sequential" else fixed.p_value(effect)
        for arm, effect in effects.items()
    }
    adjusted = holm(p_values)
    compared = []
    for arm in treatments:
        if arm not in effects:
            compared.append(Comparison(metric=metric, arm=arm))
            continue
        effect = effects[arm]
        width = (sequential if analysis.kind == "sequential" else fixed).half_width(effect, level)
        is_up = plan.is_better_up(metric)
        verdict: Verdict = "undecided"
        if adjusted[arm] <= analysis.alpha and effect.value:
            verdict = "better" if (effect.value > 0) == is_up else "worse"
        compared.append(
            Comparison(
                metric=metric,
                arm=arm,
                effect=_relative(metric, effect.value),
                low=_relative(metric, effect.value - width),
                high=_relative(metric, effect.value + width),
                p_value=p_values[arm],
                adjusted_p=adjusted[arm],
                units=effect.n,
                verdict=verdict,
            )
        )
    return compared


def _guarded(
    plan: Plan, guardrail: Guardrail, arm: str, arms: Mapping[str, ArmEvidence], control: str, num_arms: int
) -> GuardrailResult:
    """One-sided, always valid whatever the analysis is, at α over the number of arms."""
    metric = guardrail.metric
    pair = _sums_of(arms[arm], metric), _sums_of(arms[control], metric)
    effect = effect_of(*pair)
    harm = at_least = None
    if effect is not None and min(sums.n for sums in pair) >= GUARD_MIN_UNITS:
        value = -effect.value if plan.is_better_up(metric) else effect.value
        width = Sequential(plan.analysis.units).one_sided_width(effect, guardrail.alpha / num_arms)
        harm, at_least = _relative(metric, value), _relative(metric, value - width)
    return GuardrailResult(
        metric=metric,
        arm=arm,
        tolerance=guardrail.tolerance,
        action=guardrail.action,
        harm=harm,
        at_least=at_least,
        is_breached=at_least is not None and at_least > guardrail.tolerance,
    )


def _winner(plan: Plan, comparisons: list[Comparison], guardrails: list[GuardrailResult], control: str) -> str | None:
    """The best arm that is better than control and breaches nothing; control where every arm is worse."""
    decisive = [compared for compared in comparisons if compared.metric == plan.decision_metric]
    breached = {guarded.arm for guarded in guardrails if guarded.is_breached}
    better = [c for c in decisive if c.verdict == "better" and c.arm not in breached]
    if better:
        sign = 1 if plan.is_better_up(plan.decision_metric) else -1
        return max(better, key=lambda compared: sign * (compared.effect or 0.0)).arm
    return control if decisive and all(c.verdict == "worse" for c in decisive) else None


def _note(
    plan: Plan,
    units: int,
    shares: Shares,
    winner: str | None,
    comparisons: list[Comparison],
    guardrails: list[GuardrailResult],
) -> str:
    if shares.is_mismatch:
        return (
            "Units did not come to the arms in the planned shares. Something beside chance chose who is counted, so no "
            "winner is named: look for requests that are lost or answered differently in one arm, then open a phase."
        )
    if plan.analysis.kind == "fixed" and units < plan.analysis.units:
        return f"{units} of the declared {plan.analysis.units} units were exposed; nothing is said before."
    if winner is not None:
        return f"'{winner}' is the best arm in {plan.decision_metric}."
    if all(c.verdict == "too_few" for c in comparisons if c.metric == plan.decision_metric):
        return f"Fewer than {plan.analysis.min_units} units of an arm have data in {plan.decision_metric}."
    for compared in comparisons:
        if compared.metric == plan.decision_metric and compared.verdict == "better":
            rails = sorted({rail.metric for rail in guardrails if rail.is_breached and rail.arm == compared.arm})
            return f"'{compared.arm}' is better in {plan.decision_metric}, and breaches {', '.join(rails)}."
    return "Not decided yet."


def _sums_of(arm: ArmEvidence, metric: str) -> Sums:
    found = arm.metrics.get(metric, Sums())
    if isinstance(found, Sums):
        return found
    c, e2, ex, xx = found.centre, found.power(2, 0), found.power(1, 1), found.power(0, 2)
    yy, xy = e2 + 2 * c * ex + c * c * xx, ex + c * xx
    return Sums(n=found.n, y=found.y, x=found.x, yy=yy, xy=xy, xx=xx, is_binary=found.is_binary)


def _relative(metric: str, value: float) -> float:
    """Of times, whose effects are differences of logarithms, the relative change."""
    return math.expm1(min(value, 700.0)) if metric in LOGARITHMIC else value


def _shown(metric: str, mean: float | None) -> float | None:
    return _exp(mean) if metric in LOGARITHMIC else mean


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))
