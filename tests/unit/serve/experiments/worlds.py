"""Simulated users: what the evidence of an experiment is at each look, with a truth that is known."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime

import numpy as np

from serve.experiments.definition import Allocation, Arm, Plan
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments, terms
from serve.experiments.records import Experiment, Phase, State

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def experiment(*arms: str, **plan: object) -> Experiment:
    """A running one, decided on ``solved``."""
    said = {"name": "x", "alias": "x", "control": arms[0], "metrics": [{"name": "solved"}], "decision_metric": "solved"}
    allocation = Allocation(arms=tuple(Arm(name=arm, target="@base") for arm in arms))
    phase = Phase(number=1, drawn=1, allocation=allocation, coverage=1.0, opened_at=NOW)
    found = Plan.model_validate({**said, **plan})
    return Experiment(id="exp_1", plan=found, state=State.RUNNING, phase=phase, created_at=NOW, since=NOW)


def looks(
    rng: np.random.Generator,
    rates: dict[str, float],
    *,
    units: int,
    num_looks: int,
    mean_requests: float = 2.0,
    spread: float = 0.2,
) -> Iterator[Evidence]:
    """``units`` of each arm arrive one after another and rate some requests; what is known at each look.

    A unit's own rate is Beta-distributed around its arm's with the standard deviation ``spread``: requests of one
    unit are alike, so that taking them for independent is wrong.
    """
    told = {}
    for arm, rate in rates.items():
        concentration = rate * (1 - rate) / spread**2 - 1
        own = rng.beta(rate * concentration, (1 - rate) * concentration, units)
        x = 1.0 + rng.poisson(mean_requests - 1, units)
        y = rng.binomial(x.astype(int), own).astype(float)
        told[arm] = np.cumsum(terms(rate, y, x), axis=1)
    for look in range(1, num_looks + 1):
        n = units * look // num_looks
        yield Evidence(
            arms={
                arm: ArmEvidence(
                    units=n,
                    requests=int(rows[1, n - 1]),
                    metrics={"solved": Moments(n=n, centre=rates[arm], sums=tuple(rows[:, n - 1]), is_binary=True)},
                )
                for arm, rows in told.items()
            }
        )


def returning(
    rng: np.random.Generator, rates: dict[str, float], *, units: int, num_looks: int, spread: float = 0.2
) -> Iterator[Evidence]:
    """As :func:`looks`, but everybody is there from the first look on and comes back: what is known of a unit grows."""
    own = {
        arm: rng.beta(rate * (c := rate * (1 - rate) / spread**2 - 1), (1 - rate) * c, units)
        for arm, rate in rates.items()
    }
    y, x = ({arm: np.zeros(units) for arm in rates} for _ in range(2))
    for _ in range(num_looks):
        arms = {}
        for arm, rate in own.items():
            asked = rng.poisson(0.7, units)
            x[arm] += asked
            y[arm] += rng.binomial(asked, rate)
            solved = Moments.of(y[arm], x[arm], is_binary=True)
            arms[arm] = ArmEvidence(units=units, requests=int(x[arm].sum()), metrics={"solved": solved})
        yield Evidence(arms=arms)
