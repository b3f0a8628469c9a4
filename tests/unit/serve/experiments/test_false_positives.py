"""How often the analysis errs where there is nothing to see, in the cases that people have.

    LOOM_RUNS=2000 LOOM_LOOKS=100 pytest -s --timeout 0 tests/unit/serve/experiments/test_false_positives.py

Each case is looked at many times on its way, with a guardrail at tolerance 0 beside the comparison. Error is any
verdict or any breach at any look. Beside it stands what the textbook's sequence would do: the arms' own variances, and
units for its clock.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest

from serve.experiments.analysis import results_of
from serve.experiments.evidence import Evidence
from serve.experiments.records import Experiment
from serve.experiments.statistics import Sequential, effect_of
from tests.unit.serve.experiments.arrivals import KINDS, arriving, compared, returning_users
from tests.unit.serve.experiments.worlds import NOW, experiment

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("LOOM_RUNS", "200"))
LOOKS = int(os.environ.get("LOOM_LOOKS", "40"))
ALPHA = 0.05
LIMIT = ALPHA + 2.6 * math.sqrt(ALPHA * (1 - ALPHA) / RUNS)
"""What a true rate of 5 % exceeds in fewer than one in 200 tries of so many runs."""
GUARDED = {"guardrails": [{"metric": "solved", "tolerance": 0.0, "action": "roll_back"}]}


def errors(found: Experiment, looks: Iterable[Evidence]) -> tuple[bool, bool, bool]:
    """Whether a verdict was ever given, whether the guardrail was ever breached, and what the textbook would say."""
    judged = breached = textbook = False
    analysis = found.plan.analysis
    for evidence in looks:
        results = results_of(found, evidence, NOW)
        decisive = next(one for one in results.comparisons if one.metric == "solved")
        judged |= decisive.verdict in ("better", "worse") or results.winner is not None
        breached |= results.guardrails[0].is_breached
        effect = effect_of(evidence.arms["b"].metrics["solved"], evidence.arms["a"].metrics["solved"])
        if effect is not None and min(effect.units) >= analysis.min_units:
            plain = replace(effect, se=math.sqrt(sum(effect.variances)))
            textbook |= abs(plain.value) > Sequential(analysis.units).half_width(plain, analysis.alpha)
    return judged, breached, textbook


def told(name: str, found: list[tuple[bool, bool, bool]], capsys: pytest.CaptureFixture[str]) -> None:
    judged, breached, textbook = np.mean(found, axis=0)
    with capsys.disabled():
        print(f"\n{name:45s} verdicts {judged:6.1%}, roll-backs {breached:6.1%}; textbook {textbook:6.1%}", end="")
    assert judged <= LIMIT and breached <= LIMIT


@pytest.mark.parametrize("weights", [(1, 1), (9, 1), (1, 9)], ids=lambda w: f"{w[0]}:{w[1]}")
@pytest.mark.parametrize("name", KINDS)
def test_equal_arms(name, weights, capsys):
    rng, kind = np.random.default_rng(0), KINDS[name]
    running = compared(kind, weights, **GUARDED)
    found = [errors(running, arriving(rng, kind, weights, LOOKS)) for _ in range(RUNS)]
    told(f"{name}, {weights[0]}:{weights[1]}", found, capsys)


@pytest.mark.parametrize("units", [400, 5000])
@pytest.mark.parametrize(
    ("level", "differ", "rate"),
    [("feedback", False, 0.5), ("feedback", True, 0.5), ("unit", False, 0.01), ("unit", True, 0.01)],
)
def test_a_fixed_population_that_comes_back(level, differ, rate, units, capsys):
    rng = np.random.default_rng(1)
    metric = {"name": "solved", "level": level}
    running = experiment("a", "b", metrics=[metric], analysis={"units": units}, **GUARDED)
    found = [
        errors(running, returning_users(rng, 400, LOOKS, level=level, growth=1000, differ=differ, rate=rate))
        for _ in range(RUNS)
    ]
    told(f"400 users, a mean by {level}, {'unlike' if differ else 'alike'}, planned {units}", found, capsys)
