"""A process is killed in the middle of writing and of adding up, again and again: each event counts once."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from serve.registry.aggregates import Aggregates
from serve.registry.database import Database
from serve.registry.recount import Recount
from serve.registry.trials import Trials
from tests.unit.serve.experiments.histories import History, assert_right, filled, made

WRITER = """
import os, random, signal, sys
import sqlalchemy as sa
from serve.registry import aggregates, recount
from serve.registry.database import Database
from serve.registry.evidence import EvidenceReader
from serve.registry.experiments import Experiments
from serve.registry.recount import Recount
from serve.registry.trials import Trials
from tests.unit.serve.experiments.histories import History

url, name, seed = sys.argv[1:4]
left, rebuilds = int(sys.argv[4]), sys.argv[5] == "rebuilds"
aggregates.FOLDED_AT_ONCE, recount.WRITTEN_AT_ONCE = 20, 5
database = Database(url)
experiment, trials, reader = Experiments(database).get(name), Trials(database), EvidenceReader(database)
def executed(*_):
    global left
    left -= 1
    if not left:
        os.kill(os.getpid(), signal.SIGKILL)
sa.event.listen(database._engine, "after_cursor_execute", executed)
for number in range(10**6):
    history = History(experiment.id, random.Random(f"{seed}-{number}"), prefix=f"s{seed}-{number}-")
    history.shuffled()
    for batch in history.batches():
        history.write(trials, batch)
        if rebuilds:
            Recount(database).rebuild(experiment.id, 1)
        elif history.rng.random() < 0.3:
            reader.of(experiment.id, 1, experiment.plan)
    history.finish(trials)
"""


@pytest.fixture
def database(url: str) -> Iterator[Database]:
    database = filled(url)
    yield database
    database.close()


def killed(database: Database, name: str, seed: int, statement: int, *, mode: str = "folds") -> None:
    """Let a process write and add up, and be killed right after so many statements, whatever they are part of."""
    url = database._engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-c", WRITER, url, name, str(seed), str(statement), mode]
    root = Path(__file__).parents[4]
    over = subprocess.run(command, cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, timeout=120)
    assert over.returncode == -signal.SIGKILL


@pytest.mark.slow
def test_kills_in_the_middle_of_writing_and_adding_up(database: Database):
    experiment, rng = made(database, "killed"), random.Random(0)
    for seed in range(6):
        killed(database, "killed", seed, rng.randint(20, 500))
        assert Recount(database).check(experiment.id, 1) == []
    found = assert_right(database, experiment)
    assert sum(arm.requests for arm in found.arms.values()) > 50


@pytest.mark.slow
def test_kills_in_the_middle_of_counting_anew(database: Database):
    experiment, rng, stale = made(database, "recounted"), random.Random(0), 0
    for seed in range(6):
        killed(database, "recounted", seed, rng.randint(100, 500), mode="rebuilds")
        if Aggregates(database).stale():
            stale += 1
            assert Recount(database).rebuild(experiment.id, 1)
        assert Recount(database).check(experiment.id, 1) == []
    assert_right(database, experiment)
    assert stale, "no kill came while all was counted"


def test_a_killed_process_leaves_what_it_wrote(database: Database):
    """The quick one of these: one kill, and writing goes on."""
    experiment = made(database, "once")
    killed(database, "once", 0, 150)
    history = History(experiment.id, random.Random(5), prefix="after")
    for batch in history.batches():
        history.write(Trials(database), batch)
    assert_right(database, experiment)
