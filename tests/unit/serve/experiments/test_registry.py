"""Experiments in the registry, on both databases: what changes together, what is kept, and what adds up."""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
import sqlalchemy as sa

from lora_runtime.errors import Conflict, InvalidRequest, NotFound
from serve.experiments.assignment import Kind
from serve.experiments.definition import Allocation, Arm, Metric, Plan
from serve.experiments.events import Exposure, Outcome, Pair, Trial
from serve.experiments.moments import Moments
from serve.experiments.phases import Action, amended
from serve.experiments.records import Experiment, State
from serve.registry.database import Database
from serve.registry.evidence import KEPT_LOOKS, EvidenceReader
from serve.registry.experiment_tables import EffectRow, ExposureRow, TrialRow, UnitSumsRow
from serve.registry.experiments import Experiments
from serve.registry.repository import Repository
from serve.registry.trials import Trials
from serve.targets import BASE

OLD, NEW = "old@" + "a" * 64, "new@" + "b" * 64
NOW = datetime.now(UTC)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = Database(url)
    repository = Repository(database)
    for target in (OLD, NEW):
        name, version = target.split("@")
        repository.add(name, version, f"/{name}", {})
    yield database
    database.close()


@pytest.fixture
def experiments(database: Database) -> Experiments:
    return Experiments(database)


def create(experiments: Experiments, name: str = "tone", *, alias: str = "support", **more: object) -> Experiment:
    plan = Plan.model_validate({"name": name, "alias": alias, "control": "a", **more})
    arms = (Arm(name="a", target=OLD), Arm(name="b", target=NEW))
    return experiments.create(plan, Allocation(arms=arms), actor="me")


def act(experiments: Experiments, experiment: Experiment, *actions: Action, arm: str | None = None) -> Experiment:
    for action in actions:
        experiment = experiments.act(experiment.id, action, actor="me", reason="why not", arm=arm)
    return experiment


def test_what_is_written_is_read(experiments: Experiments, database: Database):
    made = create(experiments, layer={"name": "l", "share": 0.3}, metrics=[{"name": "m"}])
    assert experiments.get(made.id) == made == experiments.get("tone")
    running = act(experiments, made, Action.RUN)
    assert running == experiments.get("tone") and running.layer == (0.0, 0.3)
    snapshot = experiments.snapshot()
    assert snapshot.experiments == {"support": running}
    assert snapshot.aliases["support"].target == OLD, "the alias that was not there means control"
    again = Experiments(database)
    assert again.get("tone") == running and experiments.phases(made.id) == [running.phase]


def test_promotion_moves_the_alias_and_roll_back_moves_it_back(experiments: Experiments):
    experiments.set_alias("support", BASE, actor="me")
    decided = act(experiments, create(experiments), Action.RUN, Action.DECIDE, arm="b")
    with pytest.raises(Conflict, match="owns 'support'"):
        experiments.set_alias("support", OLD, actor="me")
    promoted = act(experiments, decided, Action.PROMOTE)
    assert experiments.snapshot().aliases["support"].target == NEW and promoted.replaced == BASE
    assert experiments.snapshot().experiments == {}
    act(experiments, promoted, Action.ROLL_BACK)
    assert experiments.snapshot().aliases["support"].target == BASE


def test_an_alias_that_was_moved_since_is_not_rolled_back(experiments: Experiments):
    promoted = act(experiments, create(experiments), Action.RUN, Action.DECIDE, Action.PROMOTE, arm="b")
    experiments.set_alias("support", BASE, actor="someone")
    with pytest.raises(Conflict, match="was moved since"):
        act(experiments, promoted, Action.ROLL_BACK)
    assert experiments.get("tone").state is State.PROMOTED


def test_one_alias_one_experiment(experiments: Experiments):
    act(experiments, create(experiments), Action.RUN)
    second = create(experiments, "second")
    with pytest.raises(Conflict, match="'tone' owns 'support'"):
        act(experiments, second, Action.SHADOW)
    with pytest.raises(Conflict, match="already"):
        create(experiments, "second")
    assert experiments.get("second").state is State.DRAFT
    assert experiments.remove("second", actor="me").id == second.id
    with pytest.raises(NotFound):
        experiments.get("second")
    with pytest.raises(Conflict, match="only a draft"):
        experiments.remove("tone", actor="me")


def test_what_an_experiment_means_cannot_be_deleted_under_it(experiments: Experiments, database: Database):
    repository = Repository(database)
    made = act(experiments, create(experiments), Action.RUN)
    for remove in (lambda: repository.remove("new"), lambda: repository.remove_version("new", "b" * 64)):
        with pytest.raises(Conflict, match="is what"):
            remove()
    act(experiments, made, Action.ROLL_BACK, Action.ARCHIVE)
    repository.remove("new")
    with pytest.raises(Conflict, match="alias support"):
        repository.remove("old")
    experiments.remove_alias("support", actor="me")
    repository.remove("old")
    with pytest.raises(NotFound, match="deleted meanwhile"):
        create(experiments, "late")


def test_a_phase_closes_when_the_next_opens(experiments: Experiments):
    made = act(experiments, create(experiments), Action.RUN)
    arms = (Arm(name="a", target=OLD), Arm(name="b", target=NEW, weight=3))
    allocation = Allocation(arms=arms)
    changed = experiments.change(
        made.id,
        lambda e: amended(e, e.plan, allocation, datetime.now(UTC), new_phase=True, redraw=False),
        actor="me",
        reason="more of it",
    )
    first, second = experiments.phases(made.id)
    assert first.closed_at == second.opened_at and second.closed_at is None
    assert (changed.phase.number, changed.phase.drawn) == (2, 1) and experiments.get(made.id) == changed
    (entry, *_) = Repository(experiments._database).audit(subject=made.id)
    assert entry.action == "experiment.phase" and entry.details["reason"] == "more of it"
    assert entry.details["after"]["phase"] == 2


def test_a_look_is_one_callers(experiments: Experiments):
    made = create(experiments)
    assert [experiments.claim(made.id, 60) for _ in range(3)] == [True, False, False]
    assert experiments.claim(made.id, 0)


def trial(number: int, experiment: str = "e", **more: object) -> Trial:
    values = {
        **{"request_id": f"r{number}", "experiment": experiment, "phase": 1, "arm": "a", "unit": f"u{number}"},
        **{"assignment": Kind.HASH, "counts": True, "owner": "key", "at": NOW},
    }
    return Trial(**{**values, **more})  # type: ignore[arg-type]


def test_events_are_added_once(database: Database):
    trials, exposure = Trials(database), Exposure(experiment="e", phase=1, unit="u", arm="a", request_id="r", at=NOW)
    for _ in range(2):
        trials.add([exposure, trial(1), Outcome(request_id="r1", status=200, first_s=0.5)])
    evidence = EvidenceReader(database).of("e", 1, Plan(name="x", alias="x"))
    assert (evidence.arms["a"].units, evidence.arms["a"].requests) == (1, 1)


def test_feedback_is_checked_and_counts_once(experiments: Experiments, database: Database):
    made = create(experiments, metrics=[{"name": "solved"}, {"name": "score", "kind": "float"}], feedback_window_s=60)
    trials, now = Trials(database), datetime.now(UTC)
    old = now - timedelta(seconds=61)
    for event in (trial(1, made.id), trial(2, made.id, at=old), trial(3, made.id, assignment=Kind.FALLBACK)):
        trials.add([replace(event, at=old if event.request_id == "r2" else now)])

    def report(request: str, metric: str, value: bool | float, key: str = "", owner: str = "key", **more: bool):
        return trials.feedback(request, metric, value, key=key, owner=owner, **more)

    assert not report("r1", "solved", True).is_repeated
    assert report("r1", "solved", True).is_repeated
    assert not report("r1", "solved", True, "second").is_repeated
    assert not report("r3", "solved", True).counts, "a fallback is no evidence"
    for wrong, error in (
        (("r1", "solved", False), Conflict),
        (("r1", "solved", 0.5), InvalidRequest),
        (("r1", "score", math.nan), InvalidRequest),
        (("r1", "score", math.inf), InvalidRequest),
        (("r1", "other", True), InvalidRequest),
        (("r2", "solved", True), InvalidRequest),
        (("r9", "solved", True), NotFound),
        (("r1", "solved", True, "k", "another key"), NotFound),
    ):
        with pytest.raises(error):
            report(*wrong)
    assert report("r1", "solved", True, "k", "another key", may_any=True).counts
    assert trials.feedback("r9", "solved", True, key="", owner="", is_last_try=False) is None


def test_pairs_hold_any_text(database: Database):
    trials = Trials(database)
    for number in range(3):
        trials.add(
            [
                Pair(
                    **{"experiment": "e", "phase": 1, "request_id": f"r{number}", "served": "a", "shadow": "b"},
                    **{"prompt": None, "answer": "a\0b", "shadow_answer": "ünï😀", "at": NOW},
                )
            ]
        )
    found = trials.pairs("e", limit=2)
    assert [pair.request_id for _, pair in found] == ["r2", "r1"] and found[0][1].answer == "a\ufffdb"
    assert trials.pairs("e", limit=2, before=found[1][0])[0][1].request_id == "r0"


def test_looks_are_thinned_and_keep_their_ends(database: Database):
    reader = EvidenceReader(database)
    for number in range(KEPT_LOOKS + 5):
        reader.keep("e", 1, NOW + timedelta(seconds=number), {"shares": {"p_value": 0.5}, "number": number})
    looks = [look.results["number"] for look in reader.looks("e", 1)]
    assert len(looks) <= KEPT_LOOKS and looks[0] == 0 and looks[-1] == KEPT_LOOKS + 4
    assert reader.lowest_p("e", 1) == 0.5 and reader.lowest_p("e", 2) == 1.0


def rows_of(database: Database, experiment: str) -> int:
    """How many rows there are of what was seen of single requests and units, or waits to be added up."""
    with database.reading() as session:
        return sum(
            session.scalar(sa.select(sa.func.count()).where(table.experiment == experiment)) or 0
            for table in (TrialRow, ExposureRow, UnitSumsRow, EffectRow)
        )


def test_what_was_seen_goes_when_its_experiment_is_long_over(experiments: Experiments, database: Database):
    trials, reader = Trials(database), EvidenceReader(database)
    made = [act(experiments, create(experiments, name, alias=name), Action.RUN) for name in ("over", "live")]
    for number, one in enumerate(made):
        ids = range(1000 * number, 1000 * number + 600)
        trials.add([trial(n, one.id) for n in ids] + [Outcome(request_id=f"r{n}", status=200) for n in ids])
        trials.add([Exposure(experiment=one.id, phase=1, unit="u", arm="a", request_id="r", at=NOW)])
        trials.add([Pair(experiment=one.id, phase=1, request_id="r", served="a", shadow="b", prompt=None, answer="",
                         shadow_answer="", at=NOW)])  # fmt: skip
    reader.keep(made[0].id, 1, NOW, {"shares": {"p_value": 0.5}})
    assert reader.of(made[0].id, 1, made[0].plan).arms["a"].requests == 600
    act(experiments, made[0], Action.ROLL_BACK, Action.ARCHIVE)
    assert trials.forget(NOW - timedelta(days=1)) == 0
    later = datetime.now(UTC) + timedelta(days=1)
    assert [trials.forget(later) for _ in range(3)] == [500, 100, 0]
    gone, kept = (reader.of(one.id, 1, one.plan) for one in made)
    assert not rows_of(database, made[0].id) and trials.pairs(made[0].id, limit=9) == []
    assert gone.arms["a"].requests == 600 and reader.looks(made[0].id, 1), "sums and results stay"
    assert kept.arms["a"].requests == 600 and len(trials.pairs(made[1].id, limit=9)) == 1


def test_what_was_seen_goes_some_at_a_time(experiments: Experiments, database: Database):
    """Units too: of them there may be millions, and all who write wait while they are deleted."""
    trials = Trials(database)
    one = act(experiments, create(experiments), Action.RUN)
    units = [
        Exposure(experiment=one.id, phase=1, unit=f"u{n}", arm="a", request_id=f"r{n}", at=NOW) for n in range(1200)
    ]
    trials.add(units)
    act(experiments, one, Action.ROLL_BACK, Action.ARCHIVE)
    later = datetime.now(UTC) + timedelta(days=1)
    assert [trials.forget(later) for _ in range(4)] == [500, 500, 200, 0]


METRICS = (
    Metric(name="liked"),
    Metric(name="liked_each", level="request"),
    Metric(name="liked_any", level="unit"),
    Metric(name="score", kind="float"),
    Metric(name="score_each", kind="float", level="request"),
    Metric(name="score_sum", kind="float", level="unit"),
)


def assert_equal_sums(found: Moments, pairs: list[tuple[float, float]]) -> None:
    y, x = (np.array(values) for values in zip(*pairs, strict=True))
    wanted = Moments.of(y, x, centre=found.centre)
    assert found.n == wanted.n and (found.x, found.y) == pytest.approx((wanted.x, wanted.y), abs=1e-9)
    assert found.sums == pytest.approx(wanted.sums, abs=1e-9)


def test_the_database_adds_up_as_python_does(database: Database, experiments: Experiments):
    """Requests, outcomes and feedback at random; every sum again, unit by unit, from lists."""
    rng = random.Random(0)
    plan = Plan.model_validate(
        {"name": "sums", "alias": "sums", "control": "a", "metrics": [m.model_dump() for m in METRICS]}
    )
    allocation = Allocation(arms=(Arm(name="a", target=OLD), Arm(name="b", target=NEW)))
    made = experiments.create(plan, allocation, actor="me")
    trials, events, reports = Trials(database), [], []
    wanted: dict[tuple[str, str], dict[str, tuple[float, float]]] = defaultdict(dict)
    units = {"a": 0, "b": 0}
    number = 0
    for unit in range(80):
        arm = rng.choice("ab")
        units[arm] += 1
        events.append(Exposure(experiment=made.id, phase=1, unit=f"u{unit}", arm=arm, request_id=f"r{number}", at=NOW))
        tally: dict[str, list[float]] = defaultdict(list)
        requests = 0
        for _ in range(rng.randint(1, 4)):
            number += 1
            kind = rng.choices([Kind.HASH, Kind.FALLBACK], [9, 1])[0]
            status = rng.choices([200, 500, 400], [8, 1, 1])[0]
            is_cold = rng.random() < 0.2
            first, token = rng.uniform(0.1, 1), rng.choice([None, rng.uniform(0.01, 0.1)])
            events.append(trial(number, made.id, arm=arm, unit=f"u{unit}", assignment=kind))
            events.append(
                Outcome(request_id=f"r{number}", status=status, is_cold=is_cold, first_s=first, token_s=token)
            )
            tally["error_rate"].append(float(status >= 500 or kind is Kind.FALLBACK))
            requests += kind is Kind.HASH
            if kind is Kind.HASH and status < 400 and not is_cold:
                tally["ttft"].append(math.log(first))
                if token is not None:
                    tally["time_per_token"].append(math.log(token))
            for key in range(rng.choice([0, 0, 1, 2])):
                liked, score = rng.random() < 0.5, rng.uniform(-2, 5)
                for metric in METRICS:
                    value = liked if metric.kind == "bool" else score
                    reports.append((f"r{number}", metric.name, value, str(key)))
                if kind is Kind.HASH:
                    tally["liked"].append(liked)
                    tally["score"].append(score)
        for name in ("error_rate", "ttft", "time_per_token", "liked", "score"):
            if tally[name]:
                wanted[arm, name][f"u{unit}"] = (sum(tally[name]), len(tally[name]))
        wanted[arm, "liked_any"][f"u{unit}"] = (float(any(tally["liked"])), 1)
        wanted[arm, "score_sum"][f"u{unit}"] = (sum(tally["score"]), 1)
        if requests:
            wanted[arm, "liked_each"][f"u{unit}"] = (sum(tally["liked"]), requests)
            wanted[arm, "score_each"][f"u{unit}"] = (sum(tally["score"]), requests)
    # Of no consequence: not counted, another phase, another experiment, without a unit.
    events += [
        trial(9001, made.id, counts=False),
        trial(9002, made.id, phase=2),
        trial(9003, "another"),
        trial(9004, made.id, unit=None, assignment=Kind.REQUEST, counts=False),
    ]
    events += [Outcome(request_id=f"r{n}", status=500, first_s=9.0) for n in range(9001, 9005)]
    trials.add(events)
    for request, metric, value, key in reports:
        trials.feedback(request, metric, value, key=key, owner="key")
    evidence = EvidenceReader(database).of(made.id, 1, plan)
    for (arm, name), by_unit in wanted.items():
        assert_equal_sums(evidence.arms[arm].metrics[name], list(by_unit.values()))
    assert {arm: found.units for arm, found in evidence.arms.items()} == units
    assert evidence.excluded["request"] == 1 and evidence.switched_units == 0
