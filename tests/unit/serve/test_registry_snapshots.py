"""Reads of the registry see one state of it, whatever is written meanwhile."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import sqlalchemy as sa

from serve.catalog import registered_of
from serve.follower import Follower
from serve.identity import Scope
from serve.registry.database import Database
from serve.registry.experiments import Experiments
from serve.registry.keys import Keys
from serve.registry.merges import Merges, MergeUnit
from serve.registry.records import LATEST, AdapterRecord, RecordDamaged
from serve.registry.repository import Repository

ONE, TWO = "1" * 64, "2" * 64


def between_statements(database: Database, table: str, do: Callable[[], object]) -> None:
    """Have ``do`` called once, right after ``database`` has read ``table``."""
    is_done = False

    def after(connection, cursor, statement, parameters, context, executemany):
        nonlocal is_done
        if not is_done and statement.startswith("SELECT") and f"FROM {table}" in statement:
            is_done = True
            do()

    sa.event.listen(database._engine, "after_cursor_execute", after)


@pytest.mark.parametrize("table", ["adapters", "versions"])
def test_a_registration_between_statements_tears_no_adapter(url: str, table: str):
    reading, writing = Database(url), Repository(Database(url))
    writing.add("a", ONE, "/1", {})
    between_statements(reading, table, lambda: writing.add("a", TWO, "/2", {}))
    (record,) = Repository(reading).adapters().values()
    assert registered_of(record).default == record.latest.id == ONE
    (record,) = Repository(reading).adapters().values()
    assert record.latest.id == TWO


@pytest.mark.parametrize("table", ["adapters", "versions"])
def test_a_removal_between_statements_tears_no_adapter(url: str, table: str):
    reading, writing = Database(url), Repository(Database(url))
    writing.add("a", ONE, "/1", {})
    between_statements(reading, table, lambda: writing.remove("a"))
    (record,) = Repository(reading).adapters().values()
    assert registered_of(record).default == ONE
    assert Repository(reading).adapters() == {}


def test_a_read_inside_another_sees_the_same_state(url: str):
    database, writing = Database(url), Repository(Database(url))
    repository = Repository(database)
    with database.reading():
        before = repository.revision()
        writing.add("a", ONE, "/1", {})
        assert (repository.revision(), repository.adapters()) == (before, {})
    assert repository.revision() > before and list(repository.adapters()) == ["a"]


def test_a_job_and_its_units_are_read_at_one_moment(url: str):
    reading, writing = Database(url), Merges(Database(url))
    job = writing.create("m", {"recipe": {"product": "adapter", "method": "sum"}}, "p", actor="t")
    claimed = writing.claim("me", 60)
    assert claimed is not None
    unit = MergeUnit(unit="u", kind="merge", num_bytes=1)
    between_statements(reading, "merges", lambda: writing.set_units(claimed, [unit]))
    assert Merges(reading).progress(job.id)[1] == []
    assert Merges(reading).progress(job.id)[1] == [unit]


async def test_a_follower_reads_everything_at_one_revision(url: str):
    """Keys, adapters and aliases of one state: what an alias means is there."""
    database, writer = Database(url), Database(url)
    repository, experiments, keys = Repository(database), Experiments(database), Keys(database)
    seen: list[list[int]] = []
    follower = Follower(repository.revision, snapshot=database.reading)

    def reload_keys() -> None:
        num_keys = len(keys.all())
        if not seen:
            Keys(writer).create("k", [Scope.INFER])
            Repository(writer).add("a", ONE, "/1", {})
            Experiments(writer).set_alias("m", f"a@{ONE}", actor="t")
        seen.append([num_keys])

    def reload_rest() -> None:
        seen[-1] += [len(repository.adapters()), len(experiments.snapshot().aliases)]

    follower.add(reload_keys)
    follower.add(reload_rest)
    await follower.refresh()
    await follower.refresh()
    await follower.stop()
    assert seen == [[0, 0, 0], [1, 1, 1]]


def test_rows_that_contradict_each_other_are_a_typed_error(url: str):
    Repository(Database(url)).add("a", ONE, "/1", {})
    (record,) = Repository(Database(url)).adapters().values()
    for aliases in ({}, {LATEST: TWO}):
        damaged = AdapterRecord(name="a", created_at=record.created_at, versions=record.versions, aliases=aliases)
        with pytest.raises(RecordDamaged, match="'a'"):
            _ = damaged.latest
