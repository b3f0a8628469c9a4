"""Histories of an experiment as they may come: events in any order, repeated, in batches, and what they add up to."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime

import pytest

from serve.experiments.analysis import Evidence
from serve.experiments.assignment import Kind
from serve.experiments.definition import Allocation, Arm, Metric, Plan
from serve.experiments.events import Event, Exposure, Outcome, Trial
from serve.experiments.moments import Moments
from serve.experiments.records import Experiment
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiments import Experiments
from serve.registry.recount import Recount
from serve.registry.repository import Repository
from serve.registry.trials import Trials
from tests.unit.serve.experiments.added_up import Sums, added_up

TARGETS = {"a": "old@" + "a" * 64, "b": "new@" + "b" * 64}
METRICS = (
    Metric(name="liked"),
    Metric(name="liked_each", level="request"),
    Metric(name="liked_any", level="unit"),
    Metric(name="score", kind="float"),
    Metric(name="score_each", kind="float", level="request"),
    Metric(name="score_sum", kind="float", level="unit"),
    Metric(name="capped", kind="float", cap=0.4, floor=-0.1),
    Metric(name="capped_each", kind="float", level="request", cap=0.15),
    Metric(name="capped_sum", kind="float", level="unit", cap=1.25, floor=-0.5),
)


def filled(url: str) -> Database:
    """A database with what the arms mean."""
    database = Database(url)
    for target in TARGETS.values():
        name, version = target.split("@")
        Repository(database).add(name, version, f"/{name}", {})
    return database


def made(database: Database, name: str) -> Experiment:
    plan = Plan.model_validate(
        {"name": name, "alias": name, "control": "a", "metrics": [metric.model_dump() for metric in METRICS]}
    )
    arms = tuple(Arm(name=arm, target=target) for arm, target in TARGETS.items())
    return Experiments(database).create(plan, Allocation(arms=arms), actor="me")


@dataclass(frozen=True)
class Report:
    """Feedback as it is sent."""

    request_id: str
    metric: str
    value: float
    key: str

    def send(self, trials: Trials) -> bool:
        """Whether it was taken: not before its request is known."""
        noted = trials.feedback(self.request_id, self.metric, self.value, key=self.key, owner="key", is_last_try=False)
        return noted is not None


@dataclass
class History:
    """Events and reports of ``requests`` requests by ``units`` units, all drawn from ``rng``. ``prefix`` sets their ids
    apart from those of other histories of the experiment."""

    experiment: str
    rng: random.Random
    requests: int = 30
    units: int = 8
    prefix: str = ""
    phase: int = 1
    steps: list[Event | Report] = field(default_factory=list)

    def __post_init__(self) -> None:
        rng = self.rng
        now = datetime.now(UTC)
        arms = {f"{self.prefix}u{unit}": rng.choice("ab") for unit in range(self.units)}
        told: list[Event | Report] = []
        for unit, arm in arms.items():
            told.append(
                Exposure(experiment=self.experiment, phase=self.phase, unit=unit, arm=arm, request_id="r", at=now)
            )
        for number in range(self.requests):
            request, unit = f"{self.experiment}{self.prefix}r{number}", rng.choice(list(arms))
            kind = rng.choices(list(Kind), [20, 1, 2, 1, 1, 1])[0]
            counts = kind in (Kind.HASH, Kind.FALLBACK) and rng.random() < 0.95
            is_elsewhere = rng.random() < 0.03
            arm = rng.choice("ab") if is_elsewhere else arms[unit]
            is_known = counts or rng.random() < 0.5
            told.append(
                Trial(
                    request_id=request,
                    experiment=self.experiment,
                    phase=self.phase,
                    arm=arm if is_known else None,
                    unit=unit if is_known else None,
                    assignment=kind,
                    counts=counts,
                    owner="key",
                    at=now,
                )
            )
            told.append(
                Outcome(
                    request_id=request,
                    status=rng.choices([200, 404, 500, 503], [8, 1, 1, 1])[0],
                    is_cold=rng.random() < 0.2,
                    first_s=rng.choice([None, 0.0, rng.lognormvariate(-1, 1)]),
                    token_s=rng.choice([None, rng.lognormvariate(-4, 0.5)]),
                )
            )
            for key in range(rng.choice([0, 0, 0, 1, 2])):
                score = rng.choice([rng.gauss(0, 1), rng.gauss(1e8, 0.1), rng.choice([-1e9, 1e9, 0.1, 1e-12])])
                for metric in rng.sample(METRICS, 2):
                    value = float(rng.random() < 0.5) if metric.kind == "bool" else score
                    told.append(Report(request, metric.name, value, str(key)))
        self.steps = [*told, *(step for step in told if rng.random() < 0.2)]

    def shuffled(self) -> list[Event | Report]:
        self.rng.shuffle(self.steps)
        return self.steps

    def batches(self) -> Iterator[list[Event | Report]]:
        rest = list(self.steps)
        while rest:
            size = self.rng.randint(1, 12)
            yield rest[:size]
            rest = rest[size:]

    def write(self, trials: Trials, batch: list[Event | Report]) -> None:
        """Write a batch's events in one transaction, then its reports; those that come too early are lost to their
        sender, who sends them again at the end."""
        trials.add([step for step in batch if not isinstance(step, Report)])
        for step in batch:
            if isinstance(step, Report) and not step.send(trials):
                self.late.append(step)

    def finish(self, trials: Trials) -> None:
        for report in self.late:
            assert report.send(trials)
        self.late.clear()

    late: list[Report] = field(default_factory=list)


def assert_right(database: Database, experiment: Experiment, phase: int = 1) -> Evidence:
    """The sums are what all rows add up to: by the recount to the last bit, and by the database's own sums."""
    assert Recount(database).check(experiment.id, phase) == []
    found = EvidenceReader(database).of(experiment.id, phase, experiment.plan)
    assert Recount(database).check(experiment.id, phase) == []
    wanted = added_up(database, experiment.id, phase, experiment.plan)
    assert (found.excluded, found.switched_units) == (wanted.excluded, wanted.switched_units)
    assert found.arms.keys() == wanted.arms.keys()
    levels = {metric.name: metric.level for metric in experiment.plan.metrics}
    for name, arm in found.arms.items():
        theirs = wanted.arms[name]
        assert (arm.units, arm.requests, arm.fallbacks) == (theirs.units, theirs.requests, theirs.fallbacks)
        assert arm.cold_requests == theirs.cold_requests
        assert arm.cold_ln_first_s == pytest.approx(theirs.cold_ln_first_s)
        assert arm.metrics.keys() >= theirs.metrics.keys()
        for metric, moments in arm.metrics.items():
            assert isinstance(moments, Moments)
            if levels.get(metric) == "unit" and moments.n > arm.units:
                continue  # who was exposed to one arm reported in another; the database's way loses those units
            assert_equal(moments, theirs.metrics.get(metric, Sums()), (name, metric))
    return found


def assert_equal(found: Moments, wanted: Sums, where: object) -> None:
    """To the rounding of the database's sums: of values up to 1e9 that may cancel, and of their squares."""
    lost = 1e-5
    assert found.n == wanted.n and found.x == wanted.x, where
    assert found.y == pytest.approx(wanted.y, rel=1e-9, abs=lost), where
    c, e2, ex, xx = found.centre, found.power(2, 0), found.power(1, 1), found.power(0, 2)
    assert xx == wanted.xx, where
    size = max(0.0, wanted.yy) ** 0.5
    assert e2 + 2 * c * ex + c * c * xx == pytest.approx(wanted.yy, rel=1e-9, abs=lost * (lost + size)), where
    assert ex + c * xx == pytest.approx(wanted.xy, abs=xx**0.5 * (lost + 1e-9 * size)), where
