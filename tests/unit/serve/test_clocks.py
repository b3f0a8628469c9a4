"""A wall clock that is set forth and back: leases, idempotency keys, looks and API keys."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
import sqlalchemy as sa

from lora_runtime.errors import Conflict
from serve.identity import KeyRing, Scope, Unauthenticated
from serve.registry.database import Database
from serve.registry.keys import Keys
from serve.registry.merges import LeaseLost, Merges
from serve.registry.replies import Replies

YEAR = timedelta(days=365)
RECIPE = {"recipe": {"product": "adapter", "method": "linear"}}


def shift(database: Database, table: str, column: str, by: timedelta) -> None:
    """As if what was written in ``column`` had been written by a clock that was ahead by so much."""
    with database.adding() as session:
        session.execute(sa.text(f"UPDATE {table} SET {column} = :at"), {"at": datetime.now(UTC) + by})


def test_a_lease_of_the_future_keeps_no_job_for_ever(url: str):
    database = Database(url)
    merges = Merges(database)
    merges.create("m", RECIPE, "p", actor="t")
    before = merges.claim("dead", 15)
    shift(database, "merges", "leased_until", YEAR)
    after = merges.claim("living", 15)
    assert before is not None and after is not None and after.fence > before.fence
    with pytest.raises(LeaseLost):
        merges.renew(before, 15)


def test_a_lease_that_a_clock_ran_out_of_early_is_fenced(url: str):
    database = Database(url)
    merges = Merges(database)
    merges.create("m", RECIPE, "p", actor="t")
    working = merges.claim("working", 15)
    shift(database, "merges", "leased_until", -YEAR)
    assert working is not None and merges.claim("other", 15) is not None
    with pytest.raises(LeaseLost):
        merges.say(working, "I am still here")


def test_a_request_that_began_in_the_future_is_given_up(url: str):
    database = Database(url)
    replies = Replies(database)
    assert replies.begin("me", "k", "r") is None
    with pytest.raises(Conflict):
        replies.begin("me", "k", "r")
    shift(database, "idempotency", "begun_at", YEAR)
    assert replies.begin("me", "k", "r") is None


def test_a_revoked_key_stays_revoked_whatever_the_clock_says(url: str):
    database = Database(url)
    keys = Keys(database)
    key, record = keys.create("team", [Scope.INFER])
    keys.revoke(record.identity.id)
    shift(database, "api_keys", "revoked_at", YEAR)
    ring = KeyRing(keys.all, is_required=True)
    ring.reload()
    with pytest.raises(Unauthenticated):
        ring.identify(f"Bearer {key}")
