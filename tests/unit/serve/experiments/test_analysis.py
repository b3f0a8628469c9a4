"""What results say of evidence: winners, mismatches, guardrails, times."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace

import numpy as np
import pytest
import scipy.stats

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


def test_every_mean_says_what_it_is_of():
    found = results_of(experiment("a", "b"), evidence(solved=CLEAR), NOW)
    (a, b) = (arm.metrics["solved"] for arm in found.arms)
    assert (a.units, a.observations, a.mean) == (2000, 2000, 0.3)
    assert b.variance == pytest.approx(0.45 * 0.55 * 2000 / 1999)
    compared = of(found, "solved")
    assert compared.measure == "difference" and compared.units == 4000
    assert compared.relative == pytest.approx(0.5) and 0 < compared.relative_low < 0.5 < compared.relative_high
    assert 0 < compared.shrunken < compared.effect
    assert compared.confidence == pytest.approx(0.95) and compared.family == 1


def test_intervals_and_verdicts_are_one_statement_in_every_family():
    """Three arms, the worst case for two methods that were mixed: verdicts by Holm beside intervals by Bonferroni."""
    rng = np.random.default_rng(5)
    running = experiment(*"abcd", metrics=[{"name": name, "kind": "float"} for name in ("solved", "m", "n")])
    seen = set()
    for _ in range(300):
        metrics = {
            metric: {arm: Moments.of(rng.normal(rng.choice([0, 0.15]), 1, 600), np.ones(600)) for arm in "abcd"}
            for metric in ("solved", "m", "n")
        }
        for compared in results_of(running, evidence(600, **metrics), NOW).comparisons:
            if compared.low is None:
                continue
            excludes = compared.low > 0 or compared.high < 0
            assert excludes == (compared.adjusted_p <= 0.05) == (compared.verdict in ("better", "worse"))
            # Beside the three metrics, every experiment has three that are measured: 5 that do not decide, of 3 arms.
            assert compared.family == (3 if compared.metric == "solved" else 15)
            assert compared.confidence == pytest.approx(1 - 0.05 / compared.family)
            seen.add((compared.metric, compared.verdict))
    assert {("solved", "better"), ("m", "better"), ("solved", "undecided"), ("m", "undecided")} <= seen


def test_guardrails_are_breached_kept_or_neither():
    guarded = experiment("a", "b", guardrails=[{"metric": "error_rate", "tolerance": 0.02}])
    for units, errors, state in (
        (15, (0, 3), "too_few"),
        (300, (3, 6), "uncertain"),
        (8000, (80, 100), "kept"),
        (8000, (80, 600), "breached"),
    ):
        rates = {arm: rated(units, count) for arm, count in zip("ab", errors, strict=True)}
        (rail,) = results_of(guarded, evidence(units, error_rate=rates), NOW).guardrails
        assert (rail.state, rail.is_breached) == (state, state == "breached")
        assert rail.harm is None or rail.at_least < rail.harm < rail.at_most
        assert state != "kept" or rail.at_most <= 0.02


@pytest.mark.slow
def test_several_guardrails_are_one_family():
    metrics = [{"name": name, "kind": "float", "direction": "down"} for name in ("solved", *"mnopq")]
    rails = [{"metric": metric["name"], "tolerance": 0} for metric in metrics]
    rng, runs, together = np.random.default_rng(7), 600, 0
    guarded = experiment("a", "b", metrics=metrics, guardrails=rails, analysis={"units": 1200})
    for _ in range(runs):
        drawn = {m["name"]: {arm: Moments.of(rng.normal(0, 1, 600), np.ones(600)) for arm in "ab"} for m in metrics}
        found = results_of(guarded, evidence(600, **drawn), NOW).guardrails
        assert {rail.family for rail in found} == {6}
        together += any(rail.is_breached for rail in found)
    assert together / runs < 0.05


@pytest.mark.parametrize(
    ("goal", "rates", "winner"),
    [
        ("not_worse", (4000, 4000), "b"),
        ("not_worse", (4000, 3000), "a"),  # worse beyond the margin, and beyond doubt
        ("not_worse", (4000, 3700), "a"),  # the same: as good is not shown, and worse is
        ("not_worse", (4000, 3760), "b"),  # a little worse beyond doubt, and not by the margin
        ("not_worse", (400, 350), None),
        ("not_worse", (4000, 4600), "b"),
        ("equivalent", (4000, 4010), "b"),
        ("equivalent", (4000, 4240), "b"),
        ("equivalent", (4000, 4900), None),
    ],
)
def test_an_arm_may_win_by_being_as_good(goal, rates, winner):
    running = experiment("a", "b", analysis={"goal": goal, "margin": 0.05})
    units = 10_000 if max(rates) > 1000 else 1000
    solved = {arm: rated(units, count) for arm, count in zip("ab", rates, strict=True)}
    found = results_of(running, evidence(units, solved=solved), NOW)
    assert found.winner == winner, found.comparisons[0]
    if winner == "b" and rates[1] < 4500:
        assert "within 0.05" in found.note


@pytest.mark.slow
def test_an_arm_that_is_worse_by_the_margin_is_seldom_called_as_good():
    """The type I error of non-inferiority, at its worst: the arm is worse by exactly the margin."""
    rng, runs = np.random.default_rng(8), 1000
    running = experiment("a", "b", analysis={"goal": "not_worse", "margin": 0.05, "units": 4000})
    wrong = 0
    for _ in range(runs):
        counts = rng.binomial(2000, 0.4), rng.binomial(2000, 0.35)
        solved = {arm: rated(2000, int(count)) for arm, count in zip("ab", counts, strict=True)}
        wrong += results_of(running, evidence(2000, solved=solved), NOW).comparisons[0].verdict in (
            "better",
            "not_worse",
            "equivalent",
        )
    assert wrong / runs <= 0.025


def test_a_margin_belongs_to_its_goals():
    for analysis in ({"goal": "not_worse"}, {"margin": 0.1}):
        with pytest.raises(ValueError, match="'margin' is how much worse is borne"):
            experiment("a", "b", analysis=analysis)


def test_arms_whose_users_report_unequally_are_told_of():
    def reported(n: int) -> Evidence:
        solved = {"a": rated(600, 300), "b": rated(n, n // 2)}
        return evidence(2000, solved=solved)

    even = results_of(experiment("a", "b"), reported(580), NOW).reporting[0]
    assert even.rates == {"a": 0.3, "b": 0.29} and not even.is_different
    found = results_of(experiment("a", "b"), reported(300), NOW)
    assert found.reporting[0].is_different and "report solved unequally often" in found.note
    per_unit = experiment("a", "b", metrics=[{"name": "solved", "level": "unit"}])
    assert results_of(per_unit, reported(300), NOW).reporting == []


@pytest.mark.parametrize("value", [0.1, 5.0, 1e9])
def test_values_that_never_vary_are_no_difference(value):
    """However they were added up, equal constants are equal, and say nothing of how far they could be apart."""
    running = experiment("a", "b", metrics=[{"name": "solved", "kind": "float"}])
    solved = {
        "a": Moments.of(np.full(1000, value), np.ones(1000), centre=value * (1 - 1e-12)),
        "b": Moments.of(np.full(1000, value), np.ones(1000), centre=value * (1 + 1e-12)),
    }
    compared = of(results_of(running, evidence(1000, solved=solved), NOW), "solved")
    assert (compared.effect, compared.p_value, compared.verdict) == (0.0, 1.0, "undecided")
    assert compared.low is None, "without any spread there is no width to tell"


def test_two_constants_differ_as_surely_as_a_permutation_test_says():
    running = experiment("a", "b", metrics=[{"name": "solved", "kind": "float"}], analysis={"min_units": 10})
    for n, verdict in ((10, "undecided"), (200, "worse")):
        solved = {arm: Moments.of(np.full(n, v), np.ones(n)) for arm, v in (("a", 5.0), ("b", 4.9))}
        assert of(results_of(running, evidence(n, solved=solved), NOW), "solved").verdict == verdict


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"cap": 1.0}, "of the kind 'float'"),
        ({"kind": "float", "cap": 1.0, "floor": 1.0}, "below 'cap'"),
        ({"kind": "float", "level": "unit", "floor": 0.5}, "must lie from 'floor' to 'cap'"),
        ({"kind": "float", "level": "request", "cap": -0.5}, "must lie from 'floor' to 'cap'"),
    ],
)
def test_limits_of_a_metric_make_sense(said, message):
    with pytest.raises(ValueError, match=message):
        experiment("a", "b", metrics=[{"name": "solved", **said}])
    experiment("a", "b", metrics=[{"name": "solved", "kind": "float", "floor": 0.5, "cap": 3.0}])


def test_a_metric_that_few_units_carry_is_told_of_and_a_cap_mends_it():
    rng = np.random.default_rng(9)
    spent = {arm: np.exp(rng.normal(0, 2, 2000)) for arm in "ab"}
    wide, capped = (
        {arm: Moments.of(np.minimum(values, cap), np.ones(2000)) for arm, values in spent.items()}
        for cap in (math.inf, 20.0)
    )
    running = experiment("a", "b", metrics=[{"name": "solved", "kind": "float", "level": "unit"}])
    found = results_of(running, evidence(solved=wide), NOW)
    assert "A few units make up most of the variance of solved" in found.note
    arm = found.arms[0].metrics["solved"]
    assert arm.kurtosis == pytest.approx(scipy.stats.kurtosis(spent["a"], fisher=False), rel=1e-9)
    mended = results_of(running, evidence(solved=capped), NOW)
    assert "few units" not in mended.note
    widths = [results.comparisons[0].high - results.comparisons[0].low for results in (found, mended)]
    assert widths[1] < widths[0] / 2
