"""API keys: who is let in, how far, and that the registry cannot give a key away."""

from __future__ import annotations

from datetime import timedelta

import pytest
import sqlalchemy as sa
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import InvalidRequest, NotFound
from serve.identity import ANYONE, Forbidden, Identity, KeyRing, Scope, Unauthenticated
from serve.registry.database import Database
from serve.registry.keys import Keys
from serve.registry.repository import Repository


@pytest.fixture
def keys(url: str) -> Keys:
    return Keys(Database(url))


def ring(keys: Keys) -> KeyRing:
    made = KeyRing(keys.all, is_required=True)
    made.reload()
    return made


def test_a_key_says_who_asks(keys: Keys):
    key, record = keys.create(
        "team", [Scope.INFER], adapters=["support-*"], requests_per_minute=60, max_concurrent=4, actor="ops"
    )
    identity = ring(keys).identify(f"Bearer {key}")
    assert identity == record.identity and identity.actor == f"team ({identity.id})"
    assert (identity.requests_per_minute, identity.max_concurrent) == (60, 4)
    assert ring(keys).identify(f"bearer   {key} ") == identity
    assert identity.may_use("support-1") and not identity.may_use("Support-1") and not identity.may_use("sales")
    identity.check(Scope.INFER)
    for scope in set(Scope) - {Scope.INFER}:
        with pytest.raises(Forbidden, match=scope):
            identity.check(scope)
    with pytest.raises(Forbidden):
        identity.check_adapter("sales")


def test_the_registry_holds_no_key(url: str):
    database = Database(url)
    key, _ = Keys(database).create("team", [Scope.ADMIN])
    _, identifier, secret = key.split("_", 2)
    with database.reading() as session:
        for table in ("api_keys", "audit"):
            for row in session.execute(sa.text(f"SELECT * FROM {table}")):
                assert secret not in repr(row)
    (entry,) = Repository(database).audit()
    assert (entry.action, entry.subject) == ("key.create", identifier)
    assert secret not in repr(Keys(database).all())


@pytest.mark.parametrize(
    "spoil",
    [
        lambda key: "",
        lambda key: key,
        lambda key: f"Basic {key}",
        lambda key: "Bearer",
        lambda key: f"Bearer {key[:-1]}",
        lambda key: f"Bearer {key}x",
        lambda key: f"Bearer {key.upper()}",
        lambda key: f"Bearer loom_{'0' * 12}_{key.split('_', 2)[2]}",
    ],
)
def test_almost_a_key_is_none(keys: Keys, spoil):
    key, _ = keys.create("team", [Scope.INFER])
    with pytest.raises(Unauthenticated):
        ring(keys).identify(spoil(key))


@given(st.text(max_size=80))
def test_nothing_else_is_a_key(text: str):
    with pytest.raises(Unauthenticated):
        KeyRing(list, is_required=True).identify(f"Bearer {text}")


def test_keys_end(keys: Keys):
    revoked, record = keys.create("old", [Scope.INFER])
    expired, _ = keys.create("brief", [Scope.INFER], lifetime=timedelta(0))
    lasting, _ = keys.create("new", [Scope.INFER], lifetime=timedelta(hours=1))
    keys.revoke(record.identity.id)
    first = keys.all()[0].revoked_at
    keys.revoke(record.identity.id)
    assert keys.all()[0].revoked_at == first is not None
    for key in (revoked, expired):
        with pytest.raises(Unauthenticated, match="expired or was revoked"):
            ring(keys).identify(f"Bearer {key}")
    assert ring(keys).identify(f"Bearer {lasting}").name == "new"
    with pytest.raises(NotFound):
        keys.revoke("nobody")


def test_a_key_needs_a_name_and_a_scope(keys: Keys):
    for name, scopes in (("", [Scope.INFER]), ("x", [])):
        with pytest.raises(InvalidRequest):
            keys.create(name, scopes)


def test_where_no_keys_are_asked_for_anyone_is_let_in():
    assert KeyRing(list, is_required=False).identify("Bearer unused") is ANYONE
    for scope in Scope:
        ANYONE.check(scope)


def test_admin_is_all_of_it():
    admin = Identity(id="1", name="a", scopes=frozenset({Scope.ADMIN}))
    for scope in Scope:
        admin.check(scope)
