"""Collecting beside registrations: no slow call under the registry's lock, nothing registered is ever deleted, and a
collector that dies leaves nothing behind that stays."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa

from lora_runtime.errors import StoreUnavailable
from lora_runtime.store.factory import open_store
from lora_runtime.store.protocol import Store
from serve.registry import connection, holds
from serve.registry.database import Database
from serve.registry.garbage import CollectionRunning, Garbage
from serve.registry.repository import Repository
from serve.registry.tables import GarbageRow, HoldRow
from tests.unit.store.conftest import publish

NOW, LATER = timedelta(0), timedelta(hours=1)


class Watched:
    """A store that calls ``before`` with each method's name and version first."""

    def __init__(self, store: Store, before: Callable[[str, str], None]) -> None:
        self._store = store
        self._before = before

    def versions(self) -> Iterable[str]:
        self._before("versions", "")
        return self._store.versions()

    def published_at(self, version: str) -> datetime | None:
        self._before("published_at", version)
        return self._store.published_at(version)

    def holds(self, version: str) -> bool:
        self._before("holds", version)
        return self._store.holds(version)

    def remove(self, version: str) -> None:
        self._before("remove", version)
        self._store.remove(version)

    def sweep(self, older_than_s: float) -> None:
        self._before("sweep", "")
        self._store.sweep(older_than_s)


class Unswept(Watched):
    """Without a grace, sweeping takes what others are just staging."""

    def sweep(self, older_than_s: float) -> None:
        return None


def watched(store: Store, before: Callable[[str, str], None]) -> Store:
    return Watched(store, before)  # type: ignore[return-value]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return open_store(str(tmp_path / "store"), tmp_path / "scratch")


def claims(database: Database) -> set[str]:
    with database.reading() as session:
        return set(session.scalars(sa.select(GarbageRow.version).where(GarbageRow.claimed_at.is_not(None))))


def test_the_store_is_never_asked_under_the_lock(url: str, store: Store, monkeypatch: pytest.MonkeyPatch):
    """Whenever it is, another process registers an adapter at that moment."""
    monkeypatch.setattr(connection, "LOCK_LIMIT_S", 1)
    database, other = Database(url), Repository(Database(url))
    asked: list[str] = []

    def register(method: str, _: str) -> None:
        asked.append(method)
        other.add(f"other{len(asked)}", f"{len(asked):064x}", "/1", {})

    slow = watched(store, register)
    for name in "abc":
        publish(store, name=name)
    garbage = Garbage(database, slow, NOW)
    assert garbage.collect() == []
    assert len(garbage.collect()) == 3
    version, path = publish(store, name="d")
    Repository(database).add("d", version, path, {}, is_there=lambda: slow.holds(version))
    assert set(asked) == {"versions", "published_at", "remove", "sweep", "holds"}


def test_what_is_registered_after_it_was_looked_at_stays(url: str, store: Store):
    database, repository = Database(url), Repository(Database(url))
    version, path = publish(store, name="a")
    Garbage(database, store, NOW).collect()

    def register(method: str, asked: str) -> None:
        if method == "published_at":
            repository.add("a", asked, path, {}, is_there=lambda: store.holds(asked))

    assert Garbage(database, watched(store, register), NOW).collect() == []
    assert store.holds(version) and claims(database) == set()


def test_what_is_being_deleted_can_be_neither_registered_nor_held(url: str, store: Store):
    database, repository = Database(url), Repository(Database(url))
    version, path = publish(store, name="a")
    Garbage(database, store, NOW).collect()
    refused: list[str] = []

    def meanwhile(method: str, asked: str) -> None:
        if method != "remove":
            return
        with pytest.raises(StoreUnavailable, match="being deleted"):
            repository.add("a", asked, path, {}, is_there=lambda: store.holds(asked))
        with pytest.raises(StoreUnavailable, match="being deleted"):
            Garbage(Database(url), store, NOW).hold(asked, "job", 60)
        refused.append(asked)

    assert Garbage(database, watched(store, meanwhile), NOW).collect() == [version] == refused
    assert repository.adapters() == {}
    again, path = publish(store, name="a")
    repository.add("a", again, path, {}, is_there=lambda: store.holds(again))
    assert store.holds(version)


def test_a_registration_whose_hold_ran_out_is_refused(url: str, store: Store, monkeypatch: pytest.MonkeyPatch):
    """It was slower than its hold lasts, and the version was deleted between its look into the store and its row."""
    monkeypatch.setattr(holds, "REGISTRATION_S", -1.0)
    database, repository = Database(url), Repository(Database(url))
    version, path = publish(store, name="a")
    garbage = Garbage(database, store, NOW)
    garbage.collect()

    def slow_look() -> bool:
        found = store.holds(version)
        assert garbage.collect() == [version]
        return found

    with pytest.raises(StoreUnavailable, match="register it again"):
        repository.add("a", version, path, {}, is_there=slow_look)
    assert repository.adapters() == {}


def test_one_process_collects_at_a_time(url: str, store: Store):
    publish(store, name="a")
    other = Garbage(Database(url), store, NOW)

    def meanwhile(method: str, _: str) -> None:
        with pytest.raises(CollectionRunning):
            other.collect()

    Garbage(Database(url), watched(store, meanwhile), NOW).collect()
    assert len(other.collect()) == 1


def test_a_store_that_fails_ends_the_claims(url: str, store: Store):
    database = Database(url)
    versions = sorted(publish(store, name=name)[0] for name in "abc")
    Garbage(database, store, NOW).collect()

    def fail(method: str, version: str) -> None:
        if method == "remove" and version == versions[1]:
            raise StoreUnavailable("no route to the bucket")

    with pytest.raises(StoreUnavailable, match="no route"):
        Garbage(database, watched(store, fail), NOW).collect()
    assert claims(database) == set()
    assert sorted(store.versions()) == versions[1:]
    assert Garbage(database, store, NOW).collect() == versions[1:]


KILLED = """
import os, signal, sys
from datetime import timedelta
from pathlib import Path
from lora_runtime.store.factory import open_store
from serve.registry.database import Database
from serve.registry.garbage import Garbage
store = open_store(sys.argv[2], Path(sys.argv[3]))
remove = store.remove
def die(version):
    if sys.argv[4] == "after":
        remove(version)
    os.kill(os.getpid(), signal.SIGKILL)
store.remove = die
Garbage(Database(sys.argv[1]), store, timedelta(0)).collect()
"""


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_collector_that_dies_holds_nothing_up(
    url: str, store: Store, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
):
    database, repository = Database(url), Repository(Database(url))
    version, path = publish(store, name="a")
    Garbage(database, store, NOW).collect()
    arguments = [url, str(tmp_path / "store"), str(tmp_path / "scratch"), when]
    ran = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, timeout=120)
    assert ran.returncode == -9, ran.stderr
    assert claims(database) == {version}
    with pytest.raises(StoreUnavailable, match="being deleted"):
        repository.add("a", version, path, {}, is_there=lambda: store.holds(version))
    monkeypatch.setattr(holds, "CLAIM_S", 0.0)  # a minute later
    if when == "after":
        with pytest.raises(StoreUnavailable, match="register it again"):
            repository.add("a", version, path, {}, is_there=lambda: store.holds(version))
        publish(store, name="a")
    repository.add("a", version, path, {}, is_there=lambda: store.holds(version))
    garbage = Garbage(database, store, NOW)
    assert garbage.collect() == garbage.collect() == []
    assert store.holds(version) and claims(database) == set()


@pytest.mark.parametrize("when", ["before", "after"])
def test_the_next_collector_finishes_what_one_that_died_began(
    url: str, store: Store, tmp_path: Path, when: str, monkeypatch: pytest.MonkeyPatch
):
    database = Database(url)
    version, _ = publish(store, name="a")
    Garbage(database, store, NOW).collect()
    arguments = [url, str(tmp_path / "store"), str(tmp_path / "scratch"), when]
    subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, timeout=120)
    monkeypatch.setattr(holds, "CLAIM_S", 0.0)
    assert Garbage(database, store, NOW).collect() == ([version] if when == "before" else [])
    assert not store.holds(version)
    with database.reading() as session:
        assert session.scalars(sa.select(GarbageRow)).all() == []


class SetClock:
    """A wall clock that tests set."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


def test_a_clock_that_is_set_forward_deletes_nothing_early(url: str, store: Store):
    clock = SetClock()
    garbage = Garbage(Database(url), store, LATER, clock=clock)
    publish(store, name="a")
    assert garbage.collect() == []
    clock.now += timedelta(days=365)
    assert garbage.collect() == [] == garbage.collect(), "the hour begins again"


def test_a_clock_that_is_set_back_keeps_nothing_for_ever(url: str, store: Store):
    clock = SetClock()
    clock.now += timedelta(days=365)
    version, _ = publish(store, name="a")
    early = Garbage(Database(url), store, NOW, clock=clock)
    assert early.collect() == []
    right = Garbage(Database(url), store, NOW)
    assert right.collect() == [], "seen in the future: the clock was wrong, and it is seen now"
    assert right.collect() == [version]


def test_registrations_and_collections_at_once(url: str, store: Store):
    """Whatever is registered is in the store, at every moment that anybody can tell."""
    names = [f"n{number}" for number in range(6)]
    gone: list[str] = []
    unexpected: list[BaseException] = []
    is_over = threading.Event()
    counted = {"registered": 0, "refused": 0, "collected": 0}
    databases = [Database(url) for _ in range(5)]

    def register(number: int) -> None:
        repository, random = Repository(databases[number]), Random(number)
        mine = names[2 * number : 2 * number + 2]
        for _ in range(25):
            name = random.choice(mine)
            version, path = publish(store, name=name)
            try:
                repository.add(name, version, path, {}, is_there=lambda v=version: store.holds(v))
            except StoreUnavailable:
                counted["refused"] += 1
                continue
            counted["registered"] += 1
            for _ in range(random.randrange(4)):
                if not store.holds(version):
                    gone.append(name)
            repository.remove(name)

    def collect(number: int) -> None:
        unswept: Store = Unswept(store, lambda *_: None)  # type: ignore[assignment]
        garbage = Garbage(databases[number], unswept, NOW)
        while not is_over.is_set():
            try:
                counted["collected"] += len(garbage.collect())
            except CollectionRunning:
                is_over.wait(0.01)

    def guarded(do: Callable[[int], None], number: int) -> None:
        try:
            do(number)
        except BaseException as error:
            unexpected.append(error)

    registering = [threading.Thread(target=guarded, args=(register, number)) for number in range(3)]
    collecting = [threading.Thread(target=guarded, args=(collect, number)) for number in (3, 4)]
    for thread in (*registering, *collecting):
        thread.start()
    for thread in registering:
        thread.join(200)
    is_over.set()
    for thread in collecting:
        thread.join(60)
    assert unexpected == [] and gone == []
    assert counted["registered"] and counted["collected"], counted
    with databases[0].reading() as session:
        assert session.scalars(sa.select(HoldRow)).all() == []
    assert claims(databases[0]) == set()
