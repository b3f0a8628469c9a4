"""What the evidence of a phase says: effects with their intervals, whether the shares are right, guardrails, a winner.

Looked at any number of times the sequential analysis errs in ``alpha`` of experiments at most; the fixed one says
nothing before its declared number of units has data. Where shares are not what was planned, no winner is named and no
arm called better: what put the units there may have made the difference, too.

Errors are counted by family. The decision metric is one, of as many comparisons as there are arms beside control; all
other metrics together are another, and all guardrails a third. Each comparison has its family's α over their number,
and its interval and its verdict are the same statement.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Literal

from serve.experiments.definition import FIRST_TOKEN, MEASURED, TOKEN_TIME, Guardrail, Plan
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments
from serve.experiments.narration import note_on
from serve.experiments.records import Experiment
from serve.experiments.results import (
    ArmResult,
    Comparison,
    GuardrailResult,
    GuardState,
    MetricResult,
    Reporting,
    Results,
    Shares,
    Verdict,
)
from serve.experiments.statistics import (
    SRM_ALPHA,
    Effect,
    Fixed,
    Sequential,
    effect_of,
    kurtosis,
    mismatch_p_value,
    unit_variance,
)

LOGARITHMIC = frozenset({FIRST_TOKEN, TOKEN_TIME})
GUARD_MIN_UNITS = 20


@dataclass(frozen=True, slots=True)
class _Pairing:
    """Everything that comparing arms with control takes."""

    plan: Plan
    arms: Mapping[str, ArmEvidence]
    control: str
    treatments: list[str]

    def effect(self, metric: str, arm: str, min_units: int) -> Effect | None:
        """None below ``min_units`` with data in either arm."""
        treatment, control = self.arms[arm], self.arms[self.control]
        of_treatment, of_control = _moments(treatment, metric), _moments(control, metric)
        if min(of_treatment.n, of_control.n) < min_units:
            return None
        declared = self.plan.metric(metric)
        is_per_unit = declared is not None and declared.level == "unit"
        seen = treatment.requests + control.requests if is_per_unit else of_treatment.x + of_control.x
        return effect_of(of_treatment, of_control, seen)


def results_of(experiment: Experiment, evidence: Evidence, as_of: datetime, *, lowest_p: float = 1.0) -> Results:
    """``lowest_p``: the smallest p-value of the shares at earlier looks; a mismatch that was seen stays seen."""
    plan, control = experiment.plan, experiment.control.name
    answering = experiment.phase.allocation.answering
    weights = [arm.weight for arm in answering]
    found = {arm.name: evidence.arms.get(arm.name, ArmEvidence(units=0, requests=0)) for arm in answering}
    counts = [found[arm.name].units for arm in answering]
    p_value = min(lowest_p, mismatch_p_value(counts, weights)) if len(answering) > 1 else 1.0
    shares = Shares(p_value=p_value, is_mismatch=p_value < SRM_ALPHA)
    pairing = _Pairing(plan, found, control, [arm.name for arm in answering if arm.name != control])
    others = sorted(({metric.name for metric in plan.metrics} | MEASURED) - {plan.decision_metric})
    with_data = sum(_moments(arm, plan.decision_metric).n for arm in found.values())
    is_waiting = plan.analysis.kind == "fixed" and with_data < plan.analysis.units
    families = [([plan.decision_metric], len(pairing.treatments)), (others, len(others) * len(pairing.treatments))]
    comparisons = [
        Comparison(metric=metric, arm=arm, measure=_measure(metric), family=size)
        if is_waiting
        else _compared(pairing, metric, arm, size, is_withheld=shares.is_mismatch)
        for metrics, size in families
        for metric in metrics
        for arm in pairing.treatments
    ]
    guardrails = [
        _guarded(pairing, guardrail, arm, len(plan.guardrails) * len(pairing.treatments))
        for guardrail in plan.guardrails
        for arm in pairing.treatments
    ]
    names = [plan.decision_metric, *others]
    reporting = [_reporting(metric.name, found) for metric in plan.metrics if metric.level == "feedback"]
    winner = None if shares.is_mismatch or is_waiting else _winner(plan, comparisons, guardrails, control)
    total = math.fsum(weights)
    results = Results(
        experiment=experiment.id,
        phase=experiment.phase.number,
        state=str(experiment.state),
        as_of=as_of,
        analysis=plan.analysis.kind,
        goal=plan.analysis.goal,
        alpha=plan.analysis.alpha,
        decision_metric=plan.decision_metric,
        units=sum(counts),
        units_with_data=with_data,
        needed_units=plan.analysis.units if plan.analysis.kind == "fixed" else None,
        control=control,
        arms=[_arm(arm.name, arm.target, arm.weight / total, found[arm.name], names) for arm in answering],
        comparisons=comparisons,
        shares=shares,
        reporting=reporting,
        guardrails=guardrails,
        excluded=dict(evidence.excluded),
        switched_units=evidence.switched_units,
        winner=winner,
        note="",
    )
    return note_on(results, plan)


def _compared(pairing: _Pairing, metric: str, arm: str, family: int, *, is_withheld: bool) -> Comparison:
    plan = pairing.plan
    analysis, alpha = plan.analysis, plan.analysis.alpha / family
    effect = pairing.effect(metric, arm, analysis.min_units)
    if effect is None:
        return Comparison(metric=metric, arm=arm, measure=_measure(metric), family=family)
    sequential = Sequential(analysis.units)
    method = sequential if analysis.kind == "sequential" else Fixed()
    width, p_value = method.half_width(effect, alpha), method.p_value(effect, alpha)
    margin = analysis.margin if metric == plan.decision_metric else None
    low, high = (effect.value - width, effect.value + width) if effect.se else (None, None)
    share = None if metric in LOGARITHMIC else effect.relative(width)
    shrunken = sequential.shrunken(effect, alpha) if analysis.kind == "sequential" else None
    return Comparison(
        metric=metric,
        arm=arm,
        measure=_measure(metric),
        effect=_in_measure(metric, effect.value),
        low=_in_measure(metric, low),
        high=_in_measure(metric, high),
        relative=share and share[0],
        relative_low=share and share[1],
        relative_high=share and share[2],
        shrunken=_in_measure(metric, shrunken),
        p_value=p_value,
        adjusted_p=min(1.0, family * p_value),
        confidence=1 - alpha,
        family=family,
        units=sum(effect.units),
        verdict="withheld" if is_withheld else _verdict(metric, low, high, plan.is_better_up(metric), margin),
    )


def _verdict(metric: str, low: float | None, high: float | None, is_up: bool, margin: float | None) -> Verdict:
    """What the interval says; ``margin`` in the measure that the metric is shown in."""
    if low is None or high is None:
        return "undecided"
    if margin is not None:
        shown_low, shown_high = _in_measure(metric, low), _in_measure(metric, high)
        assert shown_low is not None and shown_high is not None
        if max(-shown_low, shown_high) < margin:
            return "equivalent"
        if (-shown_low if is_up else shown_high) < margin and not (low > 0 if is_up else high < 0):
            return "not_worse"
    if low > 0 or high < 0:
        return "better" if (low > 0) == is_up else "worse"
    return "undecided"


def _guarded(pairing: _Pairing, guardrail: Guardrail, arm: str, family: int) -> GuardrailResult:
    """One-sided bounds, always valid whatever the analysis is."""
    plan, metric = pairing.plan, guardrail.metric
    effect = pairing.effect(metric, arm, GUARD_MIN_UNITS)
    harm = at_least = at_most = None
    state: GuardState = "too_few"
    if effect is not None:
        value = -effect.value if plan.is_better_up(metric) else effect.value
        width = Sequential(plan.analysis.units).one_sided_width(effect, guardrail.alpha / family)
        harm, at_least, at_most = (_in_measure(metric, found) for found in (value, value - width, value + width))
        assert at_least is not None and at_most is not None
        state = "uncertain"
        if at_least > guardrail.tolerance:
            state = "breached"
        elif at_most <= guardrail.tolerance and effect.se:
            state = "kept"
    return GuardrailResult(
        metric=metric,
        arm=arm,
        tolerance=guardrail.tolerance,
        action=guardrail.action,
        harm=harm,
        at_least=at_least,
        at_most=at_most,
        is_breached=state == "breached",
        state=state,
        family=family,
    )


def _reporting(metric: str, arms: Mapping[str, ArmEvidence]) -> Reporting:
    """Units that reported, against the units that were exposed, as shares against a plan."""
    exposed = {name: arm for name, arm in arms.items() if arm.units}
    reported = {name: min(arm.units, _moments(arm, metric).n) for name, arm in exposed.items()}
    p_value = 1.0
    if len(exposed) > 1:
        p_value = mismatch_p_value(list(reported.values()), [arm.units for arm in exposed.values()])
    return Reporting(
        metric=metric,
        rates={name: reported[name] / arm.units for name, arm in exposed.items()},
        p_value=p_value,
        is_different=p_value < SRM_ALPHA,
    )


def _winner(plan: Plan, comparisons: list[Comparison], guardrails: list[GuardrailResult], control: str) -> str | None:
    """The best arm that reaches the goal and breaches nothing; control where every arm is worse."""
    decisive = [compared for compared in comparisons if compared.metric == plan.decision_metric]
    breached = {guarded.arm for guarded in guardrails if guarded.is_breached}
    goals: dict[str, set[Verdict]] = {
        "better": {"better"},
        "not_worse": {"better", "not_worse", "equivalent"},
        "equivalent": {"equivalent"},
    }
    reaching = [c for c in decisive if c.verdict in goals[plan.analysis.goal] and c.arm not in breached]
    if reaching:
        sign = 1 if plan.is_better_up(plan.decision_metric) else -1
        return max(reaching, key=lambda compared: sign * (compared.effect or 0.0)).arm
    return control if decisive and all(c.verdict == "worse" for c in decisive) else None


def _arm(name: str, target: str, share: float, found: ArmEvidence, metrics: list[str]) -> ArmResult:
    shown = {}
    for metric in metrics:
        moments = _moments(found, metric)
        shown[metric] = MetricResult(
            units=moments.n,
            observations=moments.x,
            mean=_exp(moments.mean) if metric in LOGARITHMIC else moments.mean,
            variance=unit_variance(moments) if moments.n > 1 else None,
            kurtosis=kurtosis(moments),
        )
    return ArmResult(
        arm=name,
        target=target,
        units=found.units,
        planned_share=share,
        requests=found.requests,
        fallbacks=found.fallbacks,
        cold_requests=found.cold_requests,
        cold_ttft_s=_exp(found.cold_ln_first_s),
        means={metric: one.mean for metric, one in shown.items()},
        metrics=shown,
    )


def _moments(arm: ArmEvidence, metric: str) -> Moments:
    return arm.metrics.get(metric, Moments())


def _measure(metric: str) -> Literal["difference", "relative"]:
    return "relative" if metric in LOGARITHMIC else "difference"


def _in_measure(metric: str, value: float | None) -> float | None:
    """Of times, whose effects are differences of logarithms, the relative change."""
    return math.expm1(min(value, 700.0)) if value is not None and metric in LOGARITHMIC else value


def _exp(value: float | None) -> float | None:
    return None if value is None else math.exp(min(value, 700.0))
