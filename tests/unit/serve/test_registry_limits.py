"""What happens when the registry's database is locked, slow, away, full, damaged, older or newer: every wait ends, with
a typed error, nothing is half written, and it recovers."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sqlalchemy as sa
from sqlalchemy.engine import make_url

from serve.registry import connection, database
from serve.registry.database import Database, connect
from serve.registry.errors import (
    RegistryBusy,
    RegistryNotWritable,
    RegistryOutcomeUnknown,
    RegistryTooNew,
    RegistryUnavailable,
)
from serve.registry.repository import Repository
from serve.registry.schema import migrate
from tests.served import free_port
from tests.unit.serve.conftest import new_database
from tests.unit.serve.proxies import Proxy, proxy

ONE = "1" * 64
SOON_S = 20.0
"""Far more than the limits that tests set, far less than waiting for ever."""


def within(seconds: float, do: Callable[[], object]) -> object:
    """What ``do`` returns or raises, if it ends by then."""
    with ThreadPoolExecutor(1) as pool:
        try:
            return pool.submit(do).result(seconds)
        except TimeoutError:
            pytest.fail(f"it still waits after {seconds} s")


def is_sqlite(url: str) -> bool:
    return url.startswith("sqlite")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Limits that a test can wait for."""
    monkeypatch.setattr(connection, "LOCK_LIMIT_S", 1)
    monkeypatch.setattr(connection, "PING_LIMIT_S", 1)
    monkeypatch.setattr(connection, "CONNECT_LIMIT_S", 2)
    monkeypatch.setattr(database, "READ_LIMIT_S", 1.0)
    monkeypatch.setattr(database, "WRITE_LIMIT_S", 2.0)


@pytest.mark.usefixtures("quick")
def test_who_waits_for_a_lock_waits_for_so_long_only(url: str):
    holding, other = Database(url), Repository(Database(url))
    with holding.changing():
        with pytest.raises(RegistryBusy):
            within(SOON_S, lambda: other.add("a", ONE, "/1", {}))
        assert other.adapters() == {}, "reading waits for no writer"
    other.add("a", ONE, "/1", {})


@pytest.mark.usefixtures("quick")
def test_a_start_waits_for_no_lock_where_the_tables_are_current(url: str):
    holding = Database(url)
    with holding.changing():
        assert within(SOON_S, lambda: Repository(Database(url)).adapters()) == {}


def test_processes_that_hold_each_other_up_end(url: str):
    """On PostgreSQL a deadlock, on SQLite a second writer in one process."""
    if is_sqlite(url):
        pytest.skip("SQLite has one lock, so there are no deadlocks")
    first, second = Database(url), Database(url)
    Repository(first).add("a", ONE, "/1", {})
    Repository(first).add("b", ONE, "/1", {})
    both = threading.Barrier(2)

    def cross(through: Database, names: tuple[str, str]) -> str:
        try:
            with through.adding() as session:
                for number, name in enumerate(names):
                    session.execute(sa.text("UPDATE adapters SET revision = revision WHERE name = :n"), {"n": name})
                    if number == 0:
                        both.wait(10)
        except RegistryBusy:
            return "refused"
        return "done"

    with ThreadPoolExecutor(2) as pool:
        ended = pool.submit(cross, first, ("a", "b")), pool.submit(cross, second, ("b", "a"))
        assert sorted(one.result(30) for one in ended) == ["done", "refused"]


def test_a_database_of_a_later_release_is_refused_with_both_revisions(url: str):
    Repository(Database(url)).add("a", ONE, "/1", {})
    engine = connect(url)
    with engine.begin() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(RegistryTooNew, match=r"revision 9999; .* knows revisions up to 0\d+") as refused:
        Database(url)
    assert pickle.loads(pickle.dumps(refused.value)).facts == refused.value.facts
    with engine.begin() as session:
        assert session.execute(sa.text("SELECT version_num FROM alembic_version")).scalar_one() == "9999"
        assert session.execute(sa.text("SELECT count(*) FROM adapters")).scalar_one() == 1
    engine.dispose()


@pytest.mark.parametrize("revision", ["0001", "0003", "0007"])
def test_a_database_of_an_earlier_release_is_migrated(tmp_path: Path, url: str, revision: str):
    engine = connection.engine_of(url)
    migrate(engine, revision)
    engine.dispose()
    repository = Repository(Database(url))
    repository.add("a", ONE, "/1", {})
    assert list(repository.adapters()) == ["a"]


def test_a_migration_that_fails_leaves_nothing(url: str, monkeypatch: pytest.MonkeyPatch):
    engine = connection.engine_of(url)
    migrate(engine, "0006")
    tables = sa.inspect(engine).get_table_names()
    with monkeypatch.context() as patched:
        from alembic import op

        patched.setattr(op, "create_index", lambda *_, **__: (_ for _ in ()).throw(RuntimeError("power")))
        with pytest.raises(RuntimeError, match="power"):
            migrate(engine)
    assert sa.inspect(engine).get_table_names() == tables
    migrate(engine)
    engine.dispose()


def fill(reached: Database, is_full: bool) -> None:
    """Let SQLite's database have no further page, or as many as it likes."""
    with reached._engine.connect() as session:
        pages = session.exec_driver_sql("PRAGMA page_count").scalar_one() if is_full else 1 << 30
        session.exec_driver_sql(f"PRAGMA max_page_count={pages}")


def test_a_full_disk_is_said_and_nothing_is_half_written(tmp_path: Path):
    reached = Database(f"sqlite:///{tmp_path / 'r.db'}")
    repository = Repository(reached)
    repository.add("a", ONE, "/1", {})
    revision = repository.revision()
    fill(reached, True)
    for _ in range(2):
        with pytest.raises(RegistryNotWritable, match="disk is full"):
            repository.add("b", ONE, "/1", {"long": "x" * 100_000})
    assert (list(repository.adapters()), repository.revision()) == (["a"], revision)
    fill(reached, False)
    repository.add("b", ONE, "/1", {"long": "x" * 100_000})
    assert list(repository.adapters()) == ["a", "b"]


def test_a_limit_on_files_is_said_and_nothing_is_half_written(tmp_path: Path):
    """As a quota acts: the WAL cannot grow."""
    script = f"""
import resource, sys
from serve.registry.database import Database
from serve.registry.errors import RegistryNotWritable
from serve.registry.repository import Repository
repository = Repository(Database("sqlite:///{tmp_path / "r.db"}"))
repository.add("a", "1" * 64, "/1", {{}})
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, hard))
try:
    repository.add("b", "1" * 64, "/1", {{"long": "x" * 1_000_000}})
except RegistryNotWritable as error:
    print(error.message)
assert list(repository.adapters()) == ["a"]
resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
repository.add("b", "1" * 64, "/1", {{"long": "x" * 1_000_000}})
assert list(repository.adapters()) == ["a", "b"]
"""
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    assert "cannot be used now" in ran.stdout


def test_a_read_only_database_is_read_and_says_so(url: str):
    reached = Database(url)
    repository = Repository(reached)
    repository.add("a", ONE, "/1", {})
    read_only(reached, True)
    with pytest.raises(RegistryNotWritable, match="read-only"):
        repository.add("b", ONE, "/1", {})
    assert list(repository.adapters()) == ["a"]
    read_only(reached, False)
    repository.add("b", ONE, "/1", {})


def read_only(reached: Database, is_so: bool) -> None:
    with reached._engine.connect().execution_options(isolation_level="AUTOCOMMIT") as session:
        if reached._engine.dialect.name == "sqlite":
            session.exec_driver_sql(f"PRAGMA query_only={int(is_so)}")
            return
        name = reached._engine.url.database
        session.exec_driver_sql("SET default_transaction_read_only = off")
        session.exec_driver_sql(f'ALTER DATABASE "{name}" SET default_transaction_read_only = {is_so}')
    reached._engine.dispose()  # it counts for new connections


def test_a_damaged_file_is_a_typed_error(tmp_path: Path):
    file = tmp_path / "r.db"
    Database(f"sqlite:///{file}").close()
    for log in tmp_path.glob("r.db-*"):
        log.unlink()
    file.write_bytes(b"SQLite no more" * 1000)
    with pytest.raises(RegistryUnavailable):
        Database(f"sqlite:///{file}")


def test_sqlite_syncs_each_commit(tmp_path: Path):
    reached = Database(f"sqlite:///{tmp_path / 'r.db'}")
    with reached.reading() as session:
        assert session.execute(sa.text("PRAGMA synchronous")).scalar_one() == 2, "FULL"
        assert session.execute(sa.text("PRAGMA journal_mode")).scalar_one() == "wal"


@pytest.mark.skipif(shutil.which("strace") is None, reason="needs strace")
def test_an_acknowledged_write_was_synced_to_the_disk(tmp_path: Path):
    script = f"""
import os
from serve.registry.database import Database
from serve.registry.repository import Repository
repository = Repository(Database("sqlite:///{tmp_path / "r.db"}"))
for number in range(7):
    repository.add("a", f"{{number:064d}}", "/1", {{}})
    os.path.exists(f"/acknowledged-{{number}}")  # seen in the trace
"""
    trace = tmp_path / "trace"
    calls = "trace=fsync,fdatasync,stat,newfstatat"
    command = ["strace", "-f", "-qq", "-e", calls, "-o", str(trace), sys.executable, "-c", script]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=250)
    if "ptrace" in ran.stderr:
        pytest.skip("strace is not permitted here")
    assert ran.returncode == 0, ran.stderr
    num_synced = [0]
    for line in trace.read_text().splitlines():
        if "/acknowledged-" in line:
            num_synced.append(0)
        elif "sync(" in line:
            num_synced[-1] += 1
    assert len(num_synced) >= 8 and all(num_synced[:7]), f"syncs before each acknowledgement: {num_synced}"


@pytest.fixture
def proxied() -> Iterator[tuple[str, Proxy]]:
    """PostgreSQL behind a proxy."""
    with new_database() as direct:
        found = make_url(direct)
        with proxy(str(found.host), found.port or 5432) as between:
            through = found.set(host="127.0.0.1", port=between.port)
            yield through.render_as_string(hide_password=False), between


@pytest.mark.usefixtures("quick")
def test_a_server_that_answers_no_more_is_given_up(proxied: tuple[str, Proxy]):
    url, between = proxied
    reached = Database(url)
    repository = Repository(reached)
    repository.add("a", ONE, "/1", {})
    between.stall()
    for attempt in (repository.revision, lambda: repository.add("b", ONE, "/1", {}), lambda: Database(url)):
        with pytest.raises(RegistryUnavailable):
            within(SOON_S, attempt)
    between.flow()
    assert list(repository.adapters()) in (["a"], ["a", "b"])
    repository.add("b", ONE, "/1", {})


@pytest.mark.usefixtures("quick")
def test_a_server_that_falls_silent_inside_of_a_transaction_is_given_up(proxied: tuple[str, Proxy]):
    url, between = proxied
    repository = Repository(Database(url))

    def read() -> None:
        with repository._database.reading(1.0) as session:
            session.execute(sa.text("SELECT 1"))
            between.stall()
            session.execute(sa.text("SELECT 1"))

    with pytest.raises(RegistryUnavailable):
        within(SOON_S, read)
    between.flow()
    assert repository.adapters() == {}


def test_a_slow_statement_is_ended(url: str):
    reached = Database(url)
    endless = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"

    def read() -> None:
        with reached.reading(0.5) as session:
            session.execute(sa.text(endless))

    with pytest.raises(RegistryUnavailable):
        within(SOON_S, read)
    assert Repository(reached).adapters() == {}


def test_a_connection_that_is_lost_during_a_commit_leaves_the_outcome_open(proxied: tuple[str, Proxy]):
    url, between = proxied
    reached = Database(url)
    with pytest.raises(RegistryOutcomeUnknown, match="may have been made"):
        with reached.alone() as session:
            session.execute(sa.text("INSERT INTO holds VALUES ('v', 'h', now())"))
            between.drop()
    with pytest.raises(RegistryUnavailable, match="nothing was changed") as lost:
        with reached.alone() as session:
            between.drop()
            session.execute(sa.text("INSERT INTO holds VALUES ('w', 'h', now())"))
    assert not isinstance(lost.value, RegistryOutcomeUnknown)


def test_connections_that_are_cut_under_load_lose_nothing(proxied: tuple[str, Proxy]):
    url, between = proxied
    written: list[str] = []
    unexpected: list[BaseException] = []
    ends = time.monotonic() + 4

    repositories = [Repository(Database(url)) for _ in range(4)]

    def write(number: int) -> None:
        repository = repositories[number]
        for count in range(10_000):
            if time.monotonic() > ends:
                return
            name = f"a{number}-{count}"
            try:
                repository.add(name, ONE, "/1", {})
                repository.adapters()
            except RegistryUnavailable:
                continue
            except BaseException as error:
                unexpected.append(error)
                return
            written.append(name)

    with ThreadPoolExecutor(4) as pool:
        running = [pool.submit(write, number) for number in range(4)]
        while time.monotonic() < ends:
            time.sleep(0.5)
            between.drop()
        for one in running:
            one.result(60)
    assert not unexpected, unexpected
    assert written and set(written) <= set(Repository(Database(url)).adapters())


def test_a_start_says_why_the_registry_cannot_be_used(tmp_path: Path):
    """Through the command, before Ray is started: what a replica raises there would not be shown."""
    url = f"sqlite:///{tmp_path / 'registry.db'}"
    engine = connect(url)
    with engine.begin() as session:
        session.execute(sa.text("UPDATE alembic_version SET version_num = '9999'"))
    engine.dispose()
    config = tmp_path / "loom.yaml"
    config.write_text(f"{{state_dir: {tmp_path}, server: {{port: {free_port()}}}, engine: {{kind: fake}}}}")
    command = [sys.executable, "-m", "serve.cli", "serve", "--config", str(config)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, env={**os.environ, "COLUMNS": "300"})
    said = ran.stdout + ran.stderr
    assert ran.returncode != 0 and "revision 9999" in said and "Traceback" not in said, said
