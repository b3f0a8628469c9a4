"""How many units an effect takes, against statsmodels and against experiments that are simulated with so many."""

from __future__ import annotations

from dataclasses import replace
from datetime import timedelta

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from statsmodels.stats.power import NormalIndPower

from lora_runtime.errors import Conflict, InvalidRequest
from serve.experiments.analysis import results_of
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments
from serve.experiments.planning import Forecast, forecast
from tests.unit.serve.experiments.arrivals import KINDS, arriving, compared
from tests.unit.serve.experiments.worlds import NOW

ARRIVED = NOW + timedelta(days=2)


def asked(weights=(1.0, 1.0), kind="normal", units=4000, seed=0, **said) -> Forecast:
    """A plan after two days in which ``units`` came."""
    found = replace(KINDS[kind], units=units, min_units=10)
    *_, evidence = arriving(np.random.default_rng(seed), found, weights, 3)
    results = results_of(compared(found, weights), evidence, ARRIVED)
    said = {"metric": "solved", "effect": 0.1, "is_relative": False, "power": 0.8, **said}
    return forecast(results, NOW, **said)


@given(
    share=st.floats(0.05, 0.95),
    effect=st.floats(0.01, 1),
    power=st.floats(0.55, 0.99),
    kind=st.sampled_from(["normal", "share of 30 %"]),
)
def test_a_fixed_analysis_is_statsmodels(share: float, effect: float, power: float, kind: str):
    found = asked((1 - share, share), kind, effect=effect, power=power)

    def reached(units: int) -> float:
        ratio = share / (1 - share)
        return float(NormalIndPower().power(effect / found.variance**0.5, units * (1 - share), 0.05, ratio=ratio))

    # statsmodels counts the other tail too, which sees a little where there is no power to speak of.
    assert reached(found.fixed.units) >= power - 1e-9 and reached(found.fixed.units - 1) <= power + 0.005
    assert found.units_per_day == 2000 and found.fixed.days == max(0, found.fixed.units - 4000) / 2000


@pytest.mark.slow
@pytest.mark.parametrize("weights", [(1, 1), (9, 1)])
def test_so_many_units_see_the_effect_as_often_as_was_asked(weights, capsys):
    """The sequential analysis is declared and looked at as the plan says."""
    found = asked(weights, effect=0.15)
    kind = replace(KINDS["normal"], units=found.sequential.units)
    running = compared(kind, weights, units=found.sequential.analysis_units)
    rng, runs, seen = np.random.default_rng(1), 300, 0
    for _ in range(runs):
        looks = arriving(rng, kind, weights, 20, gain=0.15)
        seen += any(results_of(running, evidence, NOW).winner == "b" for evidence in looks)
    with capsys.disabled():
        print(f"\nplanned for 80 %, {weights}: seen in {seen / runs:.1%} by {found.sequential.units} units")
    assert seen / runs > 0.77


def test_relative_effects_are_of_controls_mean_and_times_are_ratios():
    plain = asked(kind="share of 30 %", effect=0.05, is_relative=True)
    assert plain.effect == pytest.approx(0.05 * plain.mean)
    results = timed()
    found = forecast(results, NOW, metric="ttft", effect=0.1, is_relative=False, power=0.8)
    again = forecast(results, NOW, metric="ttft", effect=0.1, is_relative=True, power=0.8)
    assert found == again and found.effect == 0.1


def timed():
    def times(n: int) -> Moments:
        return Moments.of(np.log(0.2) + 0.3 * (-1.0) ** np.arange(n), np.ones(n))

    arms = {name: ArmEvidence(units=500, requests=500, metrics={"ttft": times(500)}) for name in "ab"}
    return results_of(compared(KINDS["normal"], (1, 1)), Evidence(arms=arms), ARRIVED)


@pytest.mark.parametrize("said", [{"effect": 0.0}, {"effect": float("nan")}, {"metric": "none"}])
def test_what_is_no_effect_is_refused(said):
    with pytest.raises(InvalidRequest):
        asked(**said)


def test_too_little_data_is_said():
    empty = results_of(compared(KINDS["normal"], (1, 1)), Evidence(arms={}), ARRIVED)
    with pytest.raises(Conflict, match="0 units with data"):
        forecast(empty, NOW, metric="solved", effect=0.1, is_relative=False, power=0.8)


def test_control_alone_is_compared_with_nobody():
    alone = results_of(compared(KINDS["normal"], (1, 0)), Evidence(arms={}), ARRIVED)
    with pytest.raises(Conflict, match="no arm to tell from it"):
        forecast(alone, NOW, metric="solved", effect=0.1, is_relative=False, power=0.8)
