"""Units that arrive one after another, of every kind that experiments have, and looks at them through the analysis."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from serve.experiments.definition import Arm
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments, terms
from serve.experiments.records import Experiment
from tests.unit.serve.experiments.worlds import experiment

Rng = np.random.Generator
Floats = np.ndarray
Draw = Callable[[Rng, int], tuple[Floats, Floats]]
"""y and x of so many units, whatever their arm."""


@dataclass(frozen=True)
class Kind:
    """What is measured of units, and how many of them come."""

    draw: Draw
    is_binary: bool = False
    level: str = "unit"
    units: int = 20_000
    min_units: int = 100


def binary(rate: float) -> Draw:
    return lambda rng, n: ((rng.random(n) < rate) * 1.0, np.ones(n))


def revenue(rate: float, spread: float = 1.0) -> Draw:
    """Few buy, and what they pay is log-normal."""
    return lambda rng, n: ((rng.random(n) < rate) * np.exp(rng.normal(0, spread, n)), np.ones(n))


def rated(counts: Callable[[Rng, int], Floats]) -> Draw:
    """Shares of requests, of users whose own shares differ."""

    def draw(rng: Rng, n: int) -> tuple[Floats, Floats]:
        x = counts(rng, n)
        return rng.binomial(x.astype(int), rng.beta(0.6, 1.4, n)).astype(float), x

    return draw


KINDS: Mapping[str, Kind] = {
    "share of 30 %": Kind(binary(0.3), is_binary=True),
    "share of 1 %": Kind(binary(0.01), is_binary=True),
    "share of 95 %": Kind(binary(0.95), is_binary=True),
    "share of 30 %, from 10 units on": Kind(binary(0.3), is_binary=True, units=2000, min_units=10),
    "share of 99 %, from 10 units on": Kind(binary(0.99), is_binary=True, units=2000, min_units=10),
    "normal": Kind(lambda rng, n: (rng.normal(0, 1, n), np.ones(n))),
    "log-normal, sigma 1": Kind(revenue(1.0)),
    "log-normal, sigma 2": Kind(revenue(1.0, 2.0)),
    "revenue, 1 % buy": Kind(revenue(0.01)),
    "revenue, 10 % buy": Kind(revenue(0.1)),
    "stars, nearly always 5": Kind(lambda rng, n: (np.where(rng.random(n) < 0.97, 5.0, 1.0), np.ones(n))),
    "1e8 and a little": Kind(lambda rng, n: (1e8 + rng.normal(0, 0.1, n), np.ones(n))),
    "requests of users": Kind(rated(lambda rng, n: 1.0 + rng.geometric(0.15, n)), is_binary=True, level="feedback"),
    "requests of heavy users (zipf)": Kind(
        rated(lambda rng, n: np.minimum(rng.zipf(1.8, n), 2000).astype(float)), is_binary=True, level="feedback"
    ),
}


def compared(kind: Kind, weights: tuple[float, float], *, units: int = 5000, **plan: object) -> Experiment:
    """Two arms, decided on a metric ``solved`` of this kind; fewer of it is worse."""
    metric = {"name": "solved", "kind": "bool" if kind.is_binary else "float", "level": kind.level}
    analysis = {"units": units, "min_units": kind.min_units}
    found = experiment("a", "b", **{"metrics": [metric], "analysis": analysis, **plan})
    arms = tuple(Arm(name=name, target="@base", weight=weight) for name, weight in zip("ab", weights, strict=True))
    allocation = found.phase.allocation.model_copy(update={"arms": arms})
    return replace(found, phase=replace(found.phase, allocation=allocation))


def arriving(
    rng: Rng, kind: Kind, weights: tuple[float, float], num_looks: int, gain: float = 0.0
) -> Iterator[Evidence]:
    """Evidence at looks that get rarer, as units come; the second arm's values are ``gain`` larger."""
    total = kind.units
    y, x = kind.draw(rng, total)
    is_second = rng.random(total) < weights[1] / sum(weights)
    y = y + gain * x * is_second
    times = np.unique(np.geomspace(2 * kind.min_units, total, num_looks).round().astype(int))
    centre = float(y.sum() / x.sum())
    arms = {}
    for name, mine in (("a", ~is_second), ("b", is_second)):
        grown = np.zeros((14, total))
        grown[:, mine] = terms(centre, y[mine], x[mine])
        arms[name] = np.cumsum(mine)[times - 1], np.cumsum(grown, axis=1)[:, times - 1]
    for look in range(len(times)):
        yield Evidence(
            arms={
                name: ArmEvidence(
                    units=int(counts[look]),
                    requests=int(sums[1, look]),
                    metrics={
                        "solved": Moments(
                            n=int(counts[look]), centre=centre, sums=tuple(sums[:, look]), is_binary=kind.is_binary
                        )
                    },
                )
                for name, (counts, sums) in arms.items()
            }
        )


def returning_users(
    rng: Rng, num_units: int, num_looks: int, *, level: str, growth: float, differ: bool, rate: float = 0.5
) -> Iterator[Evidence]:
    """Everybody is there from the beginning and comes back, ``growth`` times as often at the end as at the first look.

    ``level``: what of it counts, as a metric's. ``differ``: whether users' own rates do.
    """
    own = rng.beta(2 * rate, 2 * (1 - rate), num_units) if differ else np.full(num_units, rate)
    pace = rng.gamma(1, 1, num_units) + 0.05
    is_second = rng.random(num_units) < 0.5
    asked, good = np.zeros(num_units), np.zeros(num_units)
    before = 0.0
    for time in np.geomspace(1, growth, num_looks):
        more = rng.poisson(pace * (time - before))
        before = time
        asked += more
        good += rng.binomial(more, own)
        y, x = (good, asked) if level == "feedback" else (np.minimum(good, 1.0), np.minimum(asked, 1.0))
        yield Evidence(
            arms={
                name: ArmEvidence(
                    units=int((mine & (asked > 0)).sum()),
                    requests=int(asked[mine].sum()),
                    metrics={"solved": Moments.of(y[mine], x[mine], is_binary=True)},
                )
                for name, mine in (("a", ~is_second), ("b", is_second))
            }
        )
