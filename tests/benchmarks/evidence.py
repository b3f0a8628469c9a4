"""What a look at an experiment costs, as requests grow, beside adding all rows up anew; and what keeping the sums costs
those who write.

    python -m tests.benchmarks.evidence [--requests 100000 1000000] [--database sqlite postgresql] [--check]

An experiment of two arms and two metrics, four requests and one report for each unit; on SQLite, and on PostgreSQL
(LOOM_TEST_POSTGRES). Rows are made by the database itself. ``before`` is the database's own sums over all rows, as
each look made them once; ``idle`` is a look where nothing came since the last one, and ``busy`` one after 3,000
requests more.
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path
from unittest.mock import patch

import sqlalchemy as sa

from serve.experiments.assignment import Kind
from serve.experiments.definition import Allocation, Arm, Plan
from serve.experiments.events import Event, Exposure, Outcome, Trial
from serve.experiments.records import Experiment
from serve.registry import trials as writing
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiment_tables import EffectRow, ExposureRow, OutcomeRow, TrialRow
from serve.registry.experiments import Experiments
from serve.registry.inserting import insert_into
from serve.registry.recount import Recount
from serve.registry.trials import Trials
from tests.unit.serve.conftest import new_database
from tests.unit.serve.experiments.added_up import added_up

PLAN = {"name": "x", "alias": "x", "metrics": [{"name": "solved"}, {"name": "solved_each", "level": "request"}]}
PER_UNIT = 4
BETWEEN_LOOKS = 3000
"""Requests of 30 s at 100 a second."""
BATCH = 500
"""Events that the recorder hands over at once, at most."""
SERIES = {
    "sqlite": "WITH RECURSIVE series(i) AS (SELECT :first UNION ALL SELECT i + 1 FROM series WHERE i < :last - 1)",
    "postgresql": "WITH series(i) AS (SELECT generate_series(CAST(:first AS bigint), CAST(:last AS bigint) - 1))",
}
HEX = {"sqlite": "printf('%032x', {})", "postgresql": "lpad(to_hex({}), 32, '0')"}
STEP = 1_000_000


def fill(database: Database, experiment: str, requests: int) -> None:
    """Rows of requests as gateways write them, without what waits to be added up."""
    kind = database._engine.dialect.name
    number = f"i / {PER_UNIT}"
    unit = HEX[kind].format(f"({number}) * 2654435761 % 4294967296")
    arm = f"CASE ({number}) % 2 WHEN 0 THEN 'a' ELSE 'b' END"
    logs = "ln(0.1 + 0.9 * ((i * 7919) % 1000) / 1000.0)" if kind == "postgresql" else "((i * 7919) % 1000) / 400.0"
    is_true, is_false = ("1", "0") if kind == "sqlite" else ("true", "false")
    for first in range(0, requests, STEP):
        part = {"first": first, "last": min(first + STEP, requests), "e": experiment, "now": datetime.now(UTC)}
        with database._engine.connect() as connection, connection.begin():
            if kind == "postgresql":
                connection.execute(sa.text("SET LOCAL statement_timeout = '3600s'"))
            for into, what in (
                (
                    "trials (request_id, experiment, phase, arm, unit, assignment, counts, owner, at)",
                    f"'r' || i, :e, 1, {arm}, {unit}, 'hash', {is_true}, 'key', :now FROM series",
                ),
                (
                    "outcomes (request_id, status, is_cold, ln_first_s, ln_token_s, prompt_tokens, completion_tokens)",
                    f"'r' || i, CASE i % 50 WHEN 0 THEN 500 ELSE 200 END, {is_false}, {logs}, -4.0, 1, 1 FROM series",
                ),
                (
                    "exposures (experiment, phase, unit, arm, request_id, at)",
                    f":e, 1, {unit}, {arm}, 'r' || i, :now FROM series WHERE i % {PER_UNIT} = 0",
                ),
                (
                    "feedback (request_id, metric, key, value, at)",
                    f"'r' || i, 'solved', '', i / {PER_UNIT} % 3 % 2, :now FROM series WHERE i % {PER_UNIT} = 0",
                ),
            ):
                connection.execute(sa.text(f"INSERT INTO {into} {SERIES[kind]} SELECT {what}"), _used(part, what))
    with database._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))


def _used(part: dict[str, object], what: str) -> dict[str, object]:
    return {name: value for name, value in part.items() if name in ("first", "last") or f":{name}" in what}


def more(experiment: str, first: int, requests: int) -> list[Event]:
    """Of units that were there before."""
    rng, now, events = random.Random(first), datetime.now(UTC), list[Event]()
    for number in range(first, first + requests):
        unit = rng.randrange(first // PER_UNIT)
        seen = {
            **{"experiment": experiment, "phase": 1, "unit": f"{unit * 2654435761 % 4294967296:032x}"},
            **{"arm": "ab"[unit % 2], "request_id": f"r{number}", "at": now},
        }
        events += [Exposure(**seen), Trial(**seen, assignment=Kind.HASH, counts=True, owner="key")]
        events.append(Outcome(request_id=f"r{number}", status=200, first_s=rng.uniform(0.1, 1), token_s=0.02))
    return events


def add_plainly(database: Database, events: Iterable[Event]) -> None:
    """Rows alone, as they were written before there were sums."""
    rows = defaultdict(list)
    for event in events:
        rows[type(event)].append(writing._values(event))
    with database.adding() as session:
        for kind, table in ((Exposure, ExposureRow), (Trial, TrialRow), (Outcome, OutcomeRow)):
            session.execute(insert_into(session, table).on_conflict_do_nothing(), rows[kind])


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def per_second(events: list[Event], write: Callable[[list[Event]], object]) -> float:
    batches = [events[first : first + BATCH] for first in range(0, len(events), BATCH)]
    return len(events) / sum(seconds(lambda: write(batch)) for batch in batches)  # noqa: B023  # called at once


def looks(database: Database, experiment: Experiment, requests: int) -> None:
    """Print what looks cost at so many requests."""
    name, reader, recount = experiment.id, EvidenceReader(database), Recount(database)
    repeats = 3 if requests <= 1_000_000 else 1
    before = min(seconds(lambda: added_up(database, name, 1, experiment.plan)) for _ in range(repeats))
    rebuilt = seconds(lambda: recount.rebuild(name, 1))
    idle = min(seconds(lambda: reader.of(name, 1, experiment.plan)) for _ in range(5))
    busy = []
    for number in range(3):
        Trials(database).add(more(name, requests + number * BETWEEN_LOOKS, BETWEEN_LOOKS))
        busy.append(seconds(lambda: reader.of(name, 1, experiment.plan)))
    print(
        f"  {requests:>10,} requests: before {before:8.2f} s; idle {1e3 * idle:6.1f} ms ({before / idle:,.0f} times "
        f"less), busy {1e3 * min(busy):6.1f} ms ({before / min(busy):,.0f} times less); counted anew in "
        f"{rebuilt:.1f} s",
        flush=True,
    )


def writers(database: Database, experiment: Experiment, first: int) -> None:
    """Print what those who write pay, and how fast what they wrote is added up; pairs in turn."""
    name, own = experiment.id, Trials(database)
    plain, kept, calls = [], [], {"plain": list[float](), "kept": list[float]()}
    for turn in range(4):
        start = first + 2 * turn * BETWEEN_LOOKS
        events = [more(name, start + part * BETWEEN_LOOKS, BETWEEN_LOOKS) for part in range(2)]
        plain.append(per_second(events[0], lambda batch: add_plainly(database, batch)))
        kept.append(per_second(events[1], own.add))
        for number in range(100):
            report = ("solved", True)
            for way, request in (("plain", start + number), ("kept", start + BETWEEN_LOOKS + number)):
                with patch.object(writing, "note_effects", writing.note_effects if way == "kept" else _nothing):
                    call = seconds(lambda: own.feedback(f"r{request}", *report, key="", owner="key"))  # noqa: B023
                calls[way].append(call)
    with database.reading() as session:
        waiting = session.scalar(sa.select(sa.func.sum(EffectRow.size))) or 0
    folding = seconds(lambda: EvidenceReader(database).of(name, 1, experiment.plan))
    middle = {way: 1e3 * sorted(found)[len(found) // 2] for way, found in calls.items()}
    written = 4 * 3 * BETWEEN_LOOKS + 400
    print(
        f"  written: {max(plain):,.0f} events/s without effects, {max(kept):,.0f} with; a report "
        f"{middle['plain']:.2f} ms without, {middle['kept']:.2f} ms with; {written:,} events "
        f"({waiting:,} effects) added up at {written / folding:,.0f} events/s",
        flush=True,
    )


def _nothing(*_: object) -> None:
    pass


def measure(kind: str, requests: int, *, check: bool) -> None:
    """Print all figures for one database of so many requests."""
    with ExitStack() as stack:
        if kind == "sqlite":
            url = f"sqlite:///{Path(stack.enter_context(tempfile.TemporaryDirectory())) / 'registry.db'}"
        else:
            url = stack.enter_context(new_database())
        database = Database(url)
        arms = tuple(Arm(name=arm, target="@base") for arm in "ab")
        plan = Plan.model_validate({**PLAN, "control": "a"})
        experiment = Experiments(database).create(plan, Allocation(arms=arms), actor="benchmark")
        print(f"{kind}: rows made in {seconds(lambda: fill(database, experiment.id, requests)):.0f} s", flush=True)
        looks(database, experiment, requests)
        writers(database, experiment, requests + 3 * BETWEEN_LOOKS)
        if check:
            print(f"  differences: {Recount(database).check(experiment.id, 1)}", flush=True)
        database.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--database", nargs="+", default=list(SERIES), choices=list(SERIES))
    parser.add_argument("--check", action="store_true", help="Hold the sums against all rows at the end.")
    options = parser.parse_args()
    for kind in options.database:
        for requests in options.requests:
            measure(kind, requests, check=options.check)


if __name__ == "__main__":
    main()
