"""Sums that are kept up as events come, on both databases: always what all rows add up to."""

from __future__ import annotations

import random
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import serve.registry.aggregates as aggregates
from lora_runtime.errors import Conflict
from serve.cli import app
from serve.experiments.assignment import Kind
from serve.experiments.definition import Metric
from serve.experiments.events import Exposure, Outcome, Trial
from serve.registry.connection import engine_of
from serve.registry.database import Database
from serve.registry.errors import RegistryCounting
from serve.registry.evidence import EvidenceReader
from serve.registry.experiment_tables import (
    ArmSumsRow,
    EarlyOutcomeRow,
    EffectRow,
    ExposureRow,
    FeedbackRow,
    OutcomeRow,
    PhaseSumsRow,
    SettledRow,
    TrialRow,
    UnitSumsRow,
)
from serve.registry.experiments import Experiments
from serve.registry.recount import Recount
from serve.registry.schema import migrate
from serve.registry.trials import Trials
from tests.unit.serve.experiments.histories import History, assert_right, filled, made

NOW = datetime.now(UTC)
RAW = (TrialRow, OutcomeRow, FeedbackRow, ExposureRow)


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = filled(url)
    yield database
    database.close()


def exposed_and_asked(experiment: str, number: int, arm: str = "a", unit: str | None = None) -> list:
    unit = unit or f"u{number}"
    seen = {"experiment": experiment, "phase": 1, "unit": unit, "arm": arm, "request_id": f"r{number}", "at": NOW}
    return [Exposure(**seen), Trial(**seen, assignment=Kind.HASH, counts=True, owner="key")]


def count(database: Database, table: type) -> int:
    with database.reading() as session:
        return session.scalar(sa.select(sa.func.count()).select_from(table)) or 0


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_events_add_up_in_any_order(database: Database, seed: int):
    any_order(database, seed)


@pytest.mark.slow
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.integers(0, 2**32 - 1))
def test_events_add_up_in_any_of_many_orders(database: Database, seed: int):
    any_order(database, seed)


def any_order(database: Database, seed: int) -> None:
    """Outcomes before their requests, events and reports repeated, batches and looks anywhere."""
    rng = random.Random(seed)
    experiment, trials = made(database, f"x{uuid.uuid4().hex}"), Trials(database)
    history = History(experiment.id, rng)
    history.shuffled()
    reader = EvidenceReader(database)
    for batch in history.batches():
        history.write(trials, batch)
        if rng.random() < 0.3:
            reader.of(experiment.id, 1, experiment.plan)
    history.finish(trials)
    assert_right(database, experiment)
    assert count(database, EffectRow) == 0


@pytest.mark.parametrize("folded_at_once", [1, 5000])
def test_gateways_write_and_fold_at_once(database: Database, monkeypatch: pytest.MonkeyPatch, folded_at_once: int):
    """Each with its own connections; some events of one gateway are another's too."""
    monkeypatch.setattr(aggregates, "FOLDED_AT_ONCE", folded_at_once)
    experiment = made(database, "busy")
    url = database._engine.url.render_as_string(hide_password=False)
    is_over = threading.Event()

    def gateway(number: int) -> None:
        own = Database(url)
        trials = Trials(own)
        history = History(experiment.id, random.Random(number // 2), requests=40, prefix=f"g{number // 2}-")
        history.rng = random.Random(100 + number)
        history.shuffled()
        for batch in history.batches():
            history.write(trials, batch)
        deadline = datetime.now(UTC) + timedelta(seconds=20)
        while history.late and datetime.now(UTC) < deadline:  # the other one may have their requests
            history.late = [report for report in history.late if not report.send(trials)]
        assert not history.late
        own.close()

    def folder() -> None:
        own = Database(url)
        while not is_over.is_set():
            EvidenceReader(own).of(experiment.id, 1, experiment.plan)
        own.close()

    with ThreadPoolExecutor(6) as pool:
        folders = [pool.submit(folder) for _ in range(2)]
        gateways = [pool.submit(gateway, number) for number in range(4)]
        for one in gateways:
            one.result(60)
        is_over.set()
        for one in folders:
            one.result(60)
    assert_right(database, experiment)


@pytest.mark.parametrize("step", ["read_units", "write_units", "write_totals"])
def test_a_fold_that_fails_adds_nothing_and_loses_nothing(
    database: Database, monkeypatch: pytest.MonkeyPatch, step: str
):
    experiment, trials = made(database, "torn"), Trials(database)
    history = History(experiment.id, random.Random(1))
    for batch in history.batches():
        history.write(trials, batch)
    history.finish(trials)
    with monkeypatch.context() as patched:
        plain = getattr(aggregates, step)

        def fail(*given: object) -> None:
            plain(*given)
            raise OSError("power")

        patched.setattr(aggregates, step, fail)
        with pytest.raises(OSError, match="power"):
            EvidenceReader(database).of(experiment.id, 1, experiment.plan)
    assert_right(database, experiment)


def test_a_look_costs_what_came_since_the_last_one(database: Database):
    """Rows of requests are read by none, however many there are."""
    experiment, trials, reader = made(database, "flat"), Trials(database), EvidenceReader(database)
    trials.add([event for n in range(300) for event in exposed_and_asked(experiment.id, n)])
    reader.of(experiment.id, 1, experiment.plan)
    statements: list[str] = []
    sa.event.listen(database._engine, "before_cursor_execute", lambda *given: statements.append(given[2]))
    assert reader.of(experiment.id, 1, experiment.plan).arms["a"].requests == 300
    assert len(statements) < 10 and not [s for s in statements for table in RAW if table.__tablename__ in s.split()]
    trials.add(exposed_and_asked(experiment.id, 300))
    statements.clear()
    assert reader.of(experiment.id, 1, experiment.plan).arms["a"].requests == 301
    assert len(statements) < 30 and not [s for s in statements for table in RAW if table.__tablename__ in s.split()]


def test_a_constant_never_varies(database: Database):
    """0.1 is no binary fraction; added up a thousand times in another order it is the same still."""
    experiment, trials = made(database, "constant"), Trials(database)
    trials.add([event for n in range(60) for event in exposed_and_asked(experiment.id, n, unit=f"u{n % 7}")])
    for n in range(60):
        trials.feedback(f"r{n}", "score", 0.1, key="", owner="key")
    found = EvidenceReader(database).of(experiment.id, 1, experiment.plan).arms["a"].metrics["score"]
    assert (found.n, found.x, found.residuals) == (7, 60, (0.0, 0.0, 0.0))  # type: ignore[union-attr]


def test_a_metric_may_join(database: Database):
    """One whose mean is over requests takes those that came before it."""
    experiment, trials, reader = made(database, "joined"), Trials(database), EvidenceReader(database)
    trials.add([event for n in range(20) for event in exposed_and_asked(experiment.id, n, unit=f"u{n % 5}")])
    reader.of(experiment.id, 1, experiment.plan)
    late = (Metric(name="late_each", level="request"), Metric(name="late_any", level="unit"))
    plan = experiment.plan.model_copy(update={"metrics": (*experiment.plan.metrics, *late)})
    running = Experiments(database).change(experiment.id, lambda e: replace(e, plan=plan), actor="me", reason="more")
    found = assert_right(database, running)
    assert found.arms["a"].metrics["late_each"].x == 20 and found.arms["a"].metrics["late_any"].n == 5
    trials.feedback("r3", "late_each", True, key="", owner="key")
    trials.feedback("r4", "late_any", True, key="", owner="key")
    assert_right(database, running)


def test_phases_are_apart(database: Database):
    experiment, trials = made(database, "phased"), Trials(database)
    for phase in (1, 2):
        history = History(experiment.id, random.Random(phase), prefix=f"p{phase}-", phase=phase)
        for batch in history.batches():
            history.write(trials, batch)
        history.finish(trials)
    for phase in (1, 2):
        assert_right(database, experiment, phase)


def test_an_outcome_whose_request_is_lost_does_not_wait_for_ever(database: Database):
    trials, reader = Trials(database), EvidenceReader(database)
    trials.add([Outcome(request_id=f"lost{n}", status=200) for n in range(3)])
    reader.keep_up()
    assert count(database, EarlyOutcomeRow) == 3
    with database.adding() as session:
        session.execute(sa.update(EarlyOutcomeRow).values(at=NOW - 2 * aggregates.EARLY_FOR))
    reader.keep_up()
    assert count(database, EarlyOutcomeRow) == 0


def test_what_nobody_looks_at_is_added_up_too(database: Database):
    experiment, trials = made(database, "unseen"), Trials(database)
    trials.add(exposed_and_asked(experiment.id, 1))
    trials.feedback("r1", "liked", True, key="", owner="key")
    EvidenceReader(database).keep_up()
    assert count(database, EffectRow) == 0 and count(database, UnitSumsRow) == 1
    assert_right(database, experiment)


def test_what_differs_is_told_and_mended(database: Database):
    experiment, trials, recount = made(database, "broken"), Trials(database), Recount(database)
    history = History(experiment.id, random.Random(2))
    for batch in history.batches():
        history.write(trials, batch)
    assert_right(database, experiment)
    with database.adding() as session:
        session.execute(sa.delete(UnitSumsRow).where(UnitSumsRow.unit == "u0"))
        session.execute(sa.update(ArmSumsRow).where(ArmSumsRow.quantity == "error_rate").values(n=999))
    told = {one.what for one in recount.check(experiment.id, 1)}
    assert {"units", "units whose sums are others", "error_rate of 'a'"} <= told
    assert recount.rebuild(experiment.id, 1)
    assert_right(database, experiment)


@pytest.mark.parametrize("is_written_anew", [False, True])
def test_events_that_come_while_all_is_counted_are_counted_once(
    database: Database, monkeypatch: pytest.MonkeyPatch, is_written_anew: bool
):
    """Those before the count's state of the database and those after; also with a look in between, which is refused."""
    experiment, trials, recount = made(database, "moving"), Trials(database), Recount(database)
    parts = [History(experiment.id, random.Random(n), prefix=f"h{n}-") for n in range(4)]

    def write(part: History) -> None:
        part.shuffled()
        for batch in part.batches():
            part.write(trials, batch)
        part.finish(trials)

    write(parts[0])
    if is_written_anew:
        assert_right(database, experiment)
    write(parts[1])
    plain = Recount._write

    def busy(self: Recount, *given: object) -> None:
        def beside() -> None:
            write(parts[2])
            with pytest.raises(RegistryCounting, match="counted anew"):
                EvidenceReader(database).of(experiment.id, 1, experiment.plan)

        with ThreadPoolExecutor(1) as pool:
            pool.submit(beside).result(60)
        plain(self, *given)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(Recount, "_write", busy)
        assert recount.rebuild(experiment.id, 1)
    write(parts[3])
    assert_right(database, experiment)


def test_a_database_of_an_earlier_release_is_counted_once(tmp_path: Path, url: str):
    """Rows that were written before there were sums, and outcomes that came after of requests before."""
    experiment_of = filled(url)
    experiment = made(experiment_of, "old")
    history = History(experiment.id, random.Random(3))
    history.shuffled()
    half = len(history.steps) // 2
    history.write(Trials(experiment_of), history.steps[:half])
    experiment_of.close()
    _take_back_0009(url)
    database = Database(url)
    with pytest.raises(RegistryCounting):
        EvidenceReader(database).of(experiment.id, 1, experiment.plan)
    history.write(Trials(database), history.steps[half:])
    history.finish(Trials(database))
    EvidenceReader(database).keep_up()
    assert_right(database, experiment)
    another = made(database, "new")
    Trials(database).add(exposed_and_asked(another.id, 1))
    assert_right(database, another)
    database.close()


def _take_back_0009(url: str) -> None:
    """The database as a release left it that knew no sums."""
    engine = engine_of(url)
    with engine.begin() as connection:
        for table in (EffectRow, EarlyOutcomeRow, PhaseSumsRow, ArmSumsRow, UnitSumsRow, SettledRow):
            connection.execute(sa.text(f"DROP TABLE {table.__tablename__}"))
        connection.execute(sa.text("UPDATE alembic_version SET version_num = '0008'"))
    migrate(engine)
    engine.dispose()


def test_what_was_forgotten_is_not_counted_to_nothing(database: Database):
    from serve.experiments.phases import Action

    experiment, trials, reader = made(database, "over"), Trials(database), EvidenceReader(database)
    experiments = Experiments(database)
    trials.add([event for n in range(10) for event in exposed_and_asked(experiment.id, n)])
    before = reader.of(experiment.id, 1, experiment.plan)
    for action in (Action.RUN, Action.ROLL_BACK, Action.ARCHIVE):
        experiments.act(experiment.id, action, actor="me", reason="")
    trials.add(exposed_and_asked(experiment.id, 10))
    while trials.forget(datetime.now(UTC) + timedelta(days=1)):
        pass
    assert count(database, UnitSumsRow) == count(database, EffectRow) == 0
    assert reader.of(experiment.id, 1, experiment.plan) == before
    for recounted in (Recount(database).check, Recount(database).rebuild):
        with pytest.raises(Conflict, match="were forgotten"):
            recounted(experiment.id, 1)


def test_the_command_tells_and_mends(database: Database, monkeypatch: pytest.MonkeyPatch):
    """``loom experiments recount``, as an operator runs it beside the service."""
    monkeypatch.setenv("LOOM_REGISTRY__URL", database._engine.url.render_as_string(hide_password=False))
    experiment, trials = made(database, "told"), Trials(database)
    trials.add([event for n in range(5) for event in exposed_and_asked(experiment.id, n)])
    EvidenceReader(database).keep_up()

    def recount(*options: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, ["experiments", "recount", "told", *options])
        return ended.exit_code, ended.output

    assert recount() == (0, "Phase 1 of told agrees with its rows.\n")
    with database.adding() as session:
        session.execute(sa.delete(UnitSumsRow).where(UnitSumsRow.unit == "u0"))
    code, said = recount()
    assert code == 1 and "units: kept 4, counted 5" in said and "does not agree" in said
    assert recount("--mend")[0] == 0 and recount()[0] == 0
    assert_right(database, experiment)


def test_units_are_read_by_their_whole_key(database: Database):
    """Also where the database knows nothing of how many there are: else each look would read all units."""
    experiment, trials = made(database, "many"), Trials(database)
    trials.add([event for n in range(500) for event in exposed_and_asked(experiment.id, n)])
    EvidenceReader(database).keep_up()
    asked: list[tuple[str, object]] = []
    sa.event.listen(database._engine, "before_cursor_execute", lambda *given: asked.append(given[2:4]))
    is_sqlite = database._engine.dialect.name == "sqlite"
    with database.reading() as session:
        assert len(aggregates.read_units(session, experiment.id, 1, [f"u{n}" for n in range(0, 500, 3)])) == 167
        statement, values = asked[-1]
        explain = "EXPLAIN QUERY PLAN " if is_sqlite else "EXPLAIN ANALYZE "
        plan = "\n".join(str(row[-1]) for row in session.connection().exec_driver_sql(explain + statement, values))
    assert "unit=?" in plan if is_sqlite else "Index Cond" in plan and "Filter" not in plan, plan
