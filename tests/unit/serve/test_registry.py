"""The registry: what is written is there, in every process, after every restart, on either database."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext

from lora_runtime.errors import Conflict, NotFound
from serve.registry.database import Database, connect, migrate
from serve.registry.records import LATEST
from serve.registry.repository import Repository
from serve.registry.tables import Table

ONE, TWO, THREE = "1" * 64, "2" * 64, "3" * 64


def test_adapters_come_and_go(url):
    repository = Repository(Database(url))
    record, is_new = repository.add("a", ONE, "/a", {"rank": 4})
    assert is_new and (record.latest.id, record.latest.number, record.latest.info) == (ONE, 1, {"rank": 4})
    assert repository.adapters() == {"a": record}
    assert repository.add("a", ONE, "/b", {})[1] is False
    assert next(iter(repository.adapters().values())).latest.path == "/b"
    repository.remove("a")
    with pytest.raises(NotFound):
        repository.remove("a")
    assert repository.adapters() == {}
    assert [row.action for row in repository.audit()] == [
        "adapter.delete", "adapter.register", "alias.move", "adapter.register"
    ]  # fmt: skip


def test_other_content_is_a_further_version_and_the_bare_name_moves_when_asked(url):
    repository = Repository(Database(url))
    repository.add("a", ONE, "/1", {})
    waiting, is_new = repository.add("a", TWO, "/2", {}, activate=False)
    assert is_new and waiting.latest.id == ONE and [version.number for version in waiting.versions] == [1, 2]
    assert repository.add("a", THREE, "/3", {})[0].latest.id == THREE
    back, is_new = repository.add("a", ONE, "/1", {})
    assert not is_new and back.latest.id == ONE and len(back.versions) == 3


def test_aliases_name_versions_and_hold_them(url):
    repository = Repository(Database(url))
    repository.add("a", ONE, "/1", {})
    repository.add("a", TWO, "/2", {})
    assert repository.set_alias("a", "prod", ONE).aliases == {LATEST: TWO, "prod": ONE}
    with pytest.raises(Conflict, match="prod"):
        repository.remove_version("a", ONE)
    with pytest.raises(NotFound, match="no version"):
        repository.set_alias("a", "prod", THREE)
    with pytest.raises(Conflict, match="alone means"):
        repository.remove_alias("a", LATEST)
    repository.remove_alias("a", "prod")
    with pytest.raises(NotFound, match="no alias"):
        repository.remove_alias("a", "prod")
    repository.remove_version("a", ONE)
    assert [version.id for version in next(iter(repository.adapters().values())).versions] == [TWO]
    assert repository.add("a", ONE, "/1", {})[0].versions[-1].number == 3, "a number is never given twice in a row"
    repository.remove("a")


def test_the_audit_says_who_moved_what_from_where(url):
    repository = Repository(Database(url))
    repository.add("a", ONE, "/1", {}, actor="ada")
    repository.add("a", TWO, "/2", {}, activate=False, actor="ben")
    repository.set_alias("a", LATEST, TWO, actor="cleo")
    repository.set_alias("a", LATEST, TWO, actor="dan")
    newest, *older = repository.audit(limit=2)
    assert (newest.actor, newest.action, newest.subject) == ("cleo", "alias.move", f"a@{LATEST}")
    assert newest.details == {"before": ONE, "after": TWO}
    assert [row.actor for row in repository.audit(before=older[-1].id)] == ["ada", "ada"]


def test_the_revision_moves_with_changes_only(url):
    repository = Repository(Database(url))
    before = repository.revision()
    repository.adapters()
    for refused in (lambda: repository.remove("ghost"), lambda: repository.set_alias("ghost", "prod", ONE)):
        with pytest.raises(NotFound):
            refused()
    assert repository.revision() == before and repository.audit() == []
    repository.add("a", ONE, "/a", {})
    assert repository.revision() > before


def test_what_did_not_change_is_not_read_again(url):
    repository = Repository(Database(url))
    for name in ("b", "a", "c"):
        repository.add(name, ONE, f"/{name}", {})
    first = repository.adapters()
    assert list(first) == ["a", "b", "c"]
    assert all(repository.adapters(first)[name] is first[name] for name in first)
    for change in (
        lambda: repository.add("a", TWO, "/2", {}),
        lambda: repository.set_alias("a", "prod", ONE),
        lambda: repository.set_alias("a", "prod", ONE, pinned=True),
        lambda: repository.remove_alias("a", "prod"),
        lambda: repository.remove_version("a", ONE),
    ):
        change()
        second = repository.adapters(first)
        assert second == repository.adapters() and second["a"] != first["a"]
        assert second["b"] is first["b"] and second["c"] is first["c"]
        first = second
    repository.remove("b")
    repository.remove("a")
    repository.add("a", THREE, "/3", {})
    again = repository.adapters(first)
    assert list(again) == ["a", "c"] and again["a"].latest.id == THREE and again["c"] is first["c"]


def test_another_process_sees_it_and_so_does_the_next(url):
    first, second = Repository(Database(url)), Repository(Database(url))
    first.add("a", ONE, "/a", {})
    assert list(second.adapters()) == ["a"]
    third = Repository(Database(url))
    assert list(third.adapters()) == ["a"]


def test_processes_that_start_and_write_at_once_lose_nothing(url):
    """All of them find an empty database, and one migrates it."""

    def write(number: int) -> None:
        repository = Repository(Database(url))
        repository.add(f"a{number}", f"{number:064d}", "/a", {})
        repository.add("shared", f"{number:064d}", "/s", {})

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, range(24)))
    repository = Repository(Database(url))
    found = repository.adapters()
    assert len(found) == 25
    assert [version.number for version in found["shared"].versions] == list(range(1, 25))


def test_the_migrations_make_the_tables_that_the_code_has(url):
    engine = connect(url)
    with engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, Table.metadata) == []
    engine.dispose()


def test_a_database_from_before_there_were_migrations_keeps_its_adapters(url):
    """As ``create_all`` made them: no record of migrations, one content for each adapter."""
    engine = connect(url)
    with engine.begin() as connection:
        Table.metadata.drop_all(connection)
        connection.execute(sa.text("DROP TABLE alembic_version"))
        connection.execute(
            sa.text(
                "CREATE TABLE adapters (name VARCHAR(128) PRIMARY KEY, version VARCHAR(64) NOT NULL, "
                "path VARCHAR(4096) NOT NULL, created_at TIMESTAMP WITH TIME ZONE NOT NULL, info JSON NOT NULL)"
            )
        )
        connection.execute(sa.text("CREATE TABLE revision (id INTEGER PRIMARY KEY, number INTEGER NOT NULL)"))
        connection.execute(sa.text("INSERT INTO revision VALUES (1, 7)"))
        connection.execute(
            sa.text(f"INSERT INTO adapters VALUES ('old', '{ONE}', '/old', '2026-01-02 03:04:05', '{{\"r\": 4}}')")
        )
    migrate(engine)
    engine.dispose()
    repository = Repository(Database(url))
    (record,) = repository.adapters().values()
    assert (record.name, record.latest.id, record.latest.path, record.latest.info) == ("old", ONE, "/old", {"r": 4})
    assert repository.revision() == 8
    repository.add("old", TWO, "/new", {})
