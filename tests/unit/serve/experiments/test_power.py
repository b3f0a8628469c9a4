"""What always-valid analysis costs: power and width beside a fixed test, and what stopping does to the estimate.

LOOM_RUNS=2000 LOOM_LOOKS=100 pytest -s tests/unit/serve/experiments/test_power.py
"""

from __future__ import annotations

import math
import os
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import norm

from serve.experiments.analysis import results_of
from tests.unit.serve.experiments.arrivals import KINDS, arriving, compared
from tests.unit.serve.experiments.worlds import NOW

pytestmark = pytest.mark.slow

RUNS = int(os.environ.get("LOOM_RUNS", "150"))
LOOKS = int(os.environ.get("LOOM_LOOKS", "40"))
N = 5000


@pytest.mark.parametrize("weights", [(1, 1), (9, 1)], ids=lambda w: f"{w[0]}:{w[1]}")
@pytest.mark.parametrize("name", ["share of 30 %", "normal", "log-normal, sigma 1", "revenue, 10 % buy"])
def test_an_effect_that_a_fixed_test_of_n_sees_in_four_of_five(name, weights, capsys):
    kind = replace(KINDS[name], units=4 * N, is_binary=False)
    rng = np.random.default_rng(2)
    y, _ = kind.draw(rng, 500_000)
    share = weights[1] / sum(weights)
    gain = float((norm.isf(0.025) + norm.isf(0.2)) * y.std() / math.sqrt(N * share * (1 - share)))
    running = compared(kind, weights, units=N)
    fixed = compared(kind, weights, analysis={"kind": "fixed", "units": 10, "min_units": 10})
    seen = {N: 0, 2 * N: 0, 4 * N: 0}
    seen_fixed, covered, widths, stopped, shrunken = dict.fromkeys(seen, 0), 0, {n: [] for n in seen}, [], []
    for _ in range(RUNS):
        is_seen, holds, before = False, True, 0
        for evidence in arriving(rng, kind, weights, LOOKS, gain):
            units = sum(arm.units for arm in evidence.arms.values())
            found = results_of(running, evidence, NOW).comparisons[0]
            if found.low is None:
                continue
            holds &= found.low <= gain <= found.high
            if found.verdict == "better" and not is_seen:
                stopped.append(found.effect / gain)
                shrunken.append(found.shrunken / gain)
            is_seen |= found.verdict == "better"
            for n in seen:
                if before < n <= units:
                    peer = results_of(fixed, evidence, NOW).comparisons[0]
                    seen[n] += is_seen
                    seen_fixed[n] += peer.verdict == "better"
                    widths[n].append((found.high - found.low) / (peer.high - peer.low))
            before = units
        covered += holds
    with capsys.disabled():
        print(f"\n{name}, {weights[0]}:{weights[1]}, seen by N, 2N, 4N: sequential", end="")
        print("".join(f" {seen[n] / RUNS:4.0%}" for n in seen), "| fixed there", end="")
        print("".join(f" {seen_fixed[n] / RUNS:4.0%}" for n in seen), end="")
        print(" | width", " ".join(f"{np.mean(widths[n]):.2f}" for n in seen), "times the fixed one's", end="")
        print(
            f" | estimate at stopping {np.mean(stopped):.2f}, shrunken {np.mean(shrunken):.2f} times the truth", end=""
        )
        print(f" | the truth was always inside in {covered / RUNS:.1%}")
    assert seen[4 * N] / RUNS > 0.95 and covered / RUNS >= 0.95 - 2.6 * math.sqrt(0.0475 / RUNS)
    assert abs(np.mean(shrunken) - 1) < abs(np.mean(stopped) - 1)
