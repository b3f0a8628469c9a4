"""What results say of evidence: winners, mismatches, guardrails, times."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest

from serve.experiments.analysis import results_of
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.guardrails import due
from serve.experiments.moments import Moments
from serve.experiments.phases import Action
from serve.experiments.results import Results
from tests.unit.serve.experiments.worlds import NOW, experiment


def rated(n: int, successes: int) -> Moments:
    return Moments.of(np.arange(n) < successes, np.ones(n), is_binary=True)


def timed(n: int, seconds: float, spread: float = 0.3) -> Moments:
    """One request for each of ``n`` units; logarithms around that of ``seconds``."""
    return Moments.of(math.log(seconds) + spread * (-1.0) ** np.arange(n), np.ones(n))


def evidence(units: int | dict[str, int] = 2000, **metrics: dict[str, Moments]) -> Evidence:
    """``metrics``: by name, the sums by arm."""
    names = {arm for sums in metrics.values() for arm in sums}
    counts = units if isinstance(units, dict) else dict.fromkeys(names, units)
    return Evidence(
        arms={
            arm: ArmEvidence(
                units=counts[arm],
                requests=counts[arm],
                metrics={name: sums[arm] for name, sums in metrics.items() if arm in sums},
            )
            for arm in names
        }
    )


CLEAR = {"a": rated(2000, 600), "b": rated(2000, 900)}


def of(found: Results, metric: str, arm: str = "b"):
    return next(c for c in found.comparisons if (c.metric, c.arm) == (metric, arm))


def test_a_clear_winner_and_its_interval():
    found = results_of(experiment("a", "b"), evidence(solved=CLEAR), NOW)
    compared = of(found, "solved")
    assert found.winner == "b" and compared.verdict == "better"
    assert compared.effect == pytest.approx(0.15) and compared.low > 0.05 and compared.high < 0.25
    json.dumps(asdict(replace(found, as_of=None)))  # type: ignore[arg-type]


def test_the_winner_depends_on_which_way_is_better():
    down = experiment("a", "b", metrics=[{"name": "solved", "direction": "down"}])
    found = results_of(down, evidence(solved=CLEAR), NOW)
    assert found.winner == "a" and of(found, "solved").verdict == "worse"


def test_a_mismatch_names_no_winner_and_stays_seen():
    uneven = evidence({"a": 2400, "b": 1600}, solved=CLEAR)
    found = results_of(experiment("a", "b"), uneven, NOW)
    assert found.shares.is_mismatch and found.winner is None and "no winner" in found.note
    assert of(found, "solved").verdict == "withheld" and of(found, "solved").effect == pytest.approx(0.15)
    later = results_of(experiment("a", "b"), evidence(solved=CLEAR), NOW, lowest_p=found.shares.p_value)
    assert later.shares.is_mismatch and later.winner is None


def test_too_few_units_say_nothing():
    few = evidence(60, solved={"a": rated(60, 5), "b": rated(60, 55)})
    found = results_of(experiment("a", "b"), few, NOW)
    assert found.winner is None and of(found, "solved").verdict == "too_few" and "Fewer than 100" in found.note
    none = results_of(experiment("a", "b"), Evidence(arms={}), NOW)
    assert none.winner is None and none.units == 0 and none.shares.p_value == 1.0


def test_a_fixed_analysis_waits_for_its_number():
    early = experiment("a", "b", analysis={"kind": "fixed", "units": 10_000})
    found = results_of(early, evidence(solved=CLEAR), NOW)
    assert found.winner is None and "4000 of the declared 10000 units have data" in found.note
    assert of(found, "solved").p_value is None, "not even the numbers, which would be looked at"
    there = experiment("a", "b", analysis={"kind": "fixed", "units": 4000})
    assert results_of(there, evidence(solved=CLEAR), NOW).winner == "b"


def test_the_best_of_several_that_breach_nothing():
    rates = {"a": 600, "b": 900, "c": 950, "d": 600}
    arms = {arm: rated(2000, count) for arm, count in rates.items()}
    errors = {arm: rated(2000, 300 if arm == "c" else 0) for arm in rates}
    guarded = experiment(*"abcd", guardrails=[{"metric": "error_rate", "tolerance": 0.05}])
    found = results_of(guarded, evidence(solved=arms, error_rate=errors), NOW)
    assert found.winner == "b", "'c' is better still, and fails too often"
    assert [g.arm for g in found.guardrails if g.is_breached] == ["c"]
    assert results_of(experiment(*"abcd", guardrails=[]), evidence(solved=arms), NOW).winner == "c"


def test_guardrails_act_by_the_gravest():
    errors = {"a": rated(2000, 10), "b": rated(2000, 300)}
    rails = [{"metric": "error_rate", "action": action} for action in ("alert", "pause", "roll_back")]
    for allowed, expected in ((1, None), (2, Action.PAUSE), (3, Action.ROLL_BACK)):
        guarded = experiment("a", "b", guardrails=rails[:allowed])
        found = due(results_of(guarded, evidence(error_rate=errors), NOW))
        assert (found and found.action) == expected
    assert "guardrail error_rate: 'b' is worse than control by at least 0.1" in found.reason


def test_times_are_compared_by_their_ratio():
    slower = {"a": timed(2000, 0.2), "b": timed(2000, 0.25)}
    for tolerance, is_breached in ((0.1, True), (0.3, False)):
        guarded = experiment("a", "b", guardrails=[{"metric": "ttft", "tolerance": tolerance}])
        found = results_of(guarded, evidence(ttft=slower), NOW)
        compared = of(found, "ttft")
        assert compared.effect == pytest.approx(0.25) and 0.2 < compared.low < 0.25 < compared.high < 0.3
        assert found.guardrails[0].is_breached == is_breached
        assert [arm.means["ttft"] for arm in found.arms] == pytest.approx([0.2, 0.25])
    assert of(found, "ttft").verdict == "worse"


def test_planned_shares_are_of_answering_arms():
    found = results_of(experiment("a", "b"), evidence(solved=CLEAR), NOW)
    assert [(arm.arm, arm.planned_share) for arm in found.arms] == [("a", 0.5), ("b", 0.5)]
