"""The one sentence that results are summed up in."""

from __future__ import annotations

from dataclasses import replace

from serve.experiments.definition import Plan
from serve.experiments.results import Results


def note_on(results: Results, plan: Plan) -> Results:
    """The same results with their ``note``."""
    said = " ".join([_verdict(results, plan), *_cautions(results)])
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


def _cautions(results: Results) -> list[str]:
    different = [found.metric for found in results.reporting if found.is_different]
    if not different:
        return []
    return [
        f"The arms' users report {', '.join(different)} unequally often, so that its means are of different users: "
        "compare it over all units or requests ('level')."
    ]
