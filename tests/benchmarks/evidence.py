"""How long results take to add up, as requests grow; beside one scan of the same rows, which nothing here can beat.

    python -m tests.benchmarks.evidence [--requests 200000]

An experiment of two arms and two metrics, four requests and one report for each unit; on SQLite, and on PostgreSQL
(LOOM_TEST_POSTGRES).
"""

from __future__ import annotations

import argparse
import random
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime
from pathlib import Path

import sqlalchemy as sa

from serve.experiments.assignment import Kind
from serve.experiments.definition import Plan
from serve.experiments.events import Exposure, Outcome, Trial
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiment_tables import FeedbackRow, OutcomeRow, TrialRow
from serve.registry.trials import Trials
from tests.unit.serve.conftest import new_database

PLAN = Plan.model_validate(
    {
        **{"name": "x", "alias": "x"},
        "metrics": [{"name": "solved"}, {"name": "solved_each", "level": "request"}],
    }
)
BATCH = 2000
PER_UNIT = 4


def fill(database: Database, requests: int) -> None:
    trials, rng, now = Trials(database), random.Random(0), datetime.now(UTC)
    for first in range(0, requests, BATCH):
        events: list = []
        feedback = []
        for number in range(first, first + BATCH):
            unit, request = f"{number // PER_UNIT:032x}", f"request-{number}"
            arm = "ab"[number // PER_UNIT % 2]
            seen = {"experiment": "e", "phase": 1, "unit": unit, "arm": arm, "request_id": request, "at": now}
            events.append(Trial(**seen, assignment=Kind.HASH, counts=True, owner=""))
            events.append(Outcome(request_id=request, status=200, first_s=rng.uniform(0.1, 1), token_s=0.02))
            if number % PER_UNIT == 0:
                events.append(Exposure(**seen))
                feedback.append(
                    {
                        "request_id": request,
                        "metric": "solved",
                        "key": "",
                        "value": float(rng.random() < 0.5),
                        "at": now,
                    }
                )
        trials.add(events)
        with database.adding() as session:
            session.execute(sa.insert(FeedbackRow), feedback)


def seconds(call: Callable[[], object]) -> float:
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def scan(database: Database) -> None:
    """Every trial with its outcome, once."""
    joined = sa.select(sa.func.count(), sa.func.sum(OutcomeRow.status)).select_from(
        sa.join(TrialRow, OutcomeRow, TrialRow.request_id == OutcomeRow.request_id)
    )
    with database.reading() as session:
        session.execute(joined).one()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--requests", type=int, default=200_000)
    options = parser.parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        for name, url in (
            ("SQLite", f"sqlite:///{folder / 'registry.db'}"),
            ("PostgreSQL", stack.enter_context(new_database())),
        ):
            database = Database(url)
            written = seconds(lambda: fill(database, options.requests))  # noqa: B023  # called at once
            read = min(seconds(lambda: EvidenceReader(database).of("e", 1, PLAN)) for _ in range(3))  # noqa: B023
            limit = min(seconds(lambda: scan(database)) for _ in range(3))  # noqa: B023
            print(
                f"{name:10}  {options.requests:,} requests: written at {options.requests / written:,.0f} /s; "
                f"results in {read:.2f} s, {read / limit:.1f} times one scan ({limit:.2f} s)"
            )
            database.close()


if __name__ == "__main__":
    main()
