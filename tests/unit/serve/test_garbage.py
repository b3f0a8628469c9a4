"""Collecting the store: what a version or a hold names stays, and so does what was named a moment ago."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest

from lora_runtime.errors import StoreUnavailable
from lora_runtime.store.factory import open_store
from lora_runtime.store.protocol import Store
from serve.registry.database import Database
from serve.registry.garbage import Garbage
from serve.registry.repository import Repository
from tests.unit.store.conftest import publish

NOW, LATER = timedelta(0), timedelta(hours=1)


@pytest.fixture
def database(url: str) -> Database:
    return Database(url)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), tmp_path / "scratch")


def test_what_nobody_names_goes_at_the_second_look(database: Database, store: Store):
    garbage = Garbage(database, store, NOW)
    version, _ = publish(store, name="a")
    assert garbage.collect() == [] and store.holds(version)
    assert garbage.collect() == [version] and not store.holds(version)
    assert garbage.collect() == []


def test_what_is_registered_stays_until_nobody_names_it(database: Database, store: Store):
    repository, garbage = Repository(database), Garbage(database, store, NOW)
    version, path = publish(store, name="a")
    repository.add("a", version, path, {})
    repository.add("b", version, path, {})
    assert garbage.collect() == garbage.collect() == []
    repository.remove("a")
    assert garbage.collect() == garbage.collect() == []
    repository.remove("b")
    assert (garbage.collect(), garbage.collect()) == ([], [version])


def test_what_is_held_stays_until_its_holder_lets_go_or_time_runs_out(database: Database, store: Store):
    garbage = Garbage(database, store, NOW)
    version, _ = publish(store, name="a")
    garbage.hold(version, "job-1", seconds=60)
    garbage.hold(version, "job-2", seconds=60)
    garbage.release("job-1")
    assert garbage.collect() == garbage.collect() == []
    garbage.hold(version, "job-2", seconds=-1)
    assert (garbage.collect(), garbage.collect()) == ([], [version])


def test_what_was_named_within_the_grace_stays(database: Database, store: Store):
    patient = Garbage(database, store, LATER)
    version, _ = publish(store, name="a")
    assert patient.collect() == patient.collect() == patient.collect() == []
    hasty = Garbage(database, store, NOW)
    store.renew(version)
    assert hasty.collect() == [version], "seen before, and published anew earlier than now"


def test_registering_what_was_seen_as_garbage_keeps_it(database: Database, store: Store):
    repository, garbage = Repository(database), Garbage(database, store, NOW)
    version, path = publish(store, name="a")
    assert garbage.collect() == []
    repository.add("a", version, path, {}, is_there=lambda: store.holds(version))
    assert garbage.collect() == garbage.collect() == []
    repository.remove("a")
    assert garbage.collect() == [], "the clock begins anew"


def test_nothing_is_registered_that_was_collected_meanwhile(database: Database, store: Store):
    repository, garbage = Repository(database), Garbage(database, store, NOW)
    version, path = publish(store, name="a")
    garbage.collect()
    garbage.collect()
    with pytest.raises(StoreUnavailable, match="register it again"):
        repository.add("a", version, path, {}, is_there=lambda: store.holds(version))
    assert repository.adapters() == {} and repository.audit() == []
