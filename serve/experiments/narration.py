"""The one sentence that results are summed up in."""

from __future__ import annotations

from dataclasses import replace

from serve.experiments.definition import Plan
from serve.experiments.results import ArmResult, Results

FEW = 10
"""Units over kurtosis: of so many equal values among zeros the variance is made up. A normal metric has a third of its
units."""


def note_on(results: Results, plan: Plan) -> Results:
    """The same results with their ``note``."""
    said = " ".join([_verdict(results, plan), *_cautions(results, plan)])
    return replace(results, note=said)


def _verdict(results: Results, plan: Plan) -> str:
    metric, analysis = results.decision_metric, plan.analysis
    if results.shares.is_mismatch:
        return (
            "Units did not come to the arms in the planned shares. Something beside chance chose who is counted, so no "
            "winner is named: look for requests that are lost or answered differently in one arm, then open a phase."
        )
    if analysis.kind == "fixed" and results.units_with_data < analysis.units:
        return (
            f"{results.units_with_data} of the declared {analysis.units} units have data in {metric}; nothing is said "
            "before."
        )
    decisive = [compared for compared in results.comparisons if compared.metric == metric]
    if results.winner is not None:
        verdict = next((c.verdict for c in decisive if c.arm == results.winner), None)
        if verdict in ("not_worse", "equivalent"):
            words = "is not worse than" if verdict == "not_worse" else "is equivalent to"
            return f"'{results.winner}' {words} '{results.control}' in {metric}, within {analysis.margin:g}."
        return f"'{results.winner}' is the best arm in {metric}."
    if all(compared.verdict == "too_few" for compared in decisive):
        return f"Fewer than {analysis.min_units} units of an arm have data in {metric}."
    for compared in decisive:
        if compared.verdict == "better":
            rails = sorted(
                {rail.metric for rail in results.guardrails if rail.is_breached and rail.arm == compared.arm}
            )
            if rails:
                return f"'{compared.arm}' is better in {metric}, and breaches {', '.join(rails)}."
    return "Not decided yet."


def _cautions(results: Results, plan: Plan) -> list[str]:
    said = []
    different = [found.metric for found in results.reporting if found.is_different]
    if different:
        said.append(
            f"The arms' users report {', '.join(different)} unequally often, so that its means are of different users: "
            "compare it over all units or requests ('level')."
        )
    metric = plan.metric(results.decision_metric)
    if metric is not None and metric.kind == "float" and any(_is_carried_by_few(arm, plan) for arm in results.arms):
        said.append(
            f"A few units make up most of the variance of {metric.name}, which hides all that the others say: declare "
            "a 'cap' for it in the next experiment."
        )
    return said


def _is_carried_by_few(arm: ArmResult, plan: Plan) -> bool:
    found = arm.metrics[plan.decision_metric]
    if found.kurtosis is None or found.units < plan.analysis.min_units:
        return False
    return found.units / found.kurtosis < FEW
