"""Idempotency keys in the registry: one of many carries a request out, and all get its answer."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import sqlalchemy as sa

from lora_runtime.errors import Conflict, InvalidRequest
from serve.registry import replies
from serve.registry.database import Database
from serve.registry.replies import Replies, Reply

DONE = Reply(status=201, content_type="application/json", body=b'{"a": "\xc3\xa4"}')


def test_the_first_answer_is_everyones(url: str):
    kept = Replies(Database(url))
    assert kept.begin("me", "k", "r") is None
    kept.finish("me", "k", DONE)
    assert kept.begin("me", "k", "r") == Replies(Database(url)).begin("me", "k", "r") == DONE
    assert kept.begin("you", "k", "r") is None, "keys are their owner's"
    with pytest.raises(InvalidRequest, match="another request"):
        kept.begin("me", "k", "other")


def test_while_the_first_runs_the_others_wait_and_after_an_error_they_may_try(url: str):
    kept = Replies(Database(url))
    assert kept.begin("me", "k", "r") is None
    with pytest.raises(Conflict, match="still runs"):
        kept.begin("me", "k", "r")
    kept.forget("me", "k")
    assert kept.begin("me", "k", "r") is None


def test_only_one_of_many_carries_it_out(url: str):
    kept = Replies(Database(url))

    def begin(_: int) -> str:
        try:
            return "alone" if kept.begin("me", "k", "r") is None else "answered"
        except Conflict:
            return "waiting"

    with ThreadPoolExecutor(8) as pool:
        outcomes = list(pool.map(begin, range(24)))
    assert outcomes.count("alone") == 1 and outcomes.count("waiting") == 23


def test_what_is_renewed_still_runs_and_what_is_not_died_with_its_gateway(url: str, monkeypatch: pytest.MonkeyPatch):
    kept = Replies(Database(url))
    assert kept.begin("me", "k", "r") is None
    kept.finish("me", "k", DONE)
    kept.renew("me", "k")
    assert kept.begin("me", "k", "r") == DONE, "what has ended is not made to run again"
    assert kept.begin("me", "long", "r") is None
    monkeypatch.setattr(replies, "GIVEN_UP_AFTER", timedelta(seconds=2))
    for _ in range(3):
        time.sleep(1)
        kept.renew("me", "long")
        with pytest.raises(Conflict, match="still runs"):
            kept.begin("me", "long", "r")
    time.sleep(2.1)
    assert kept.begin("me", "long", "r") is None


def test_what_died_is_taken_over_and_what_is_old_is_forgotten(url: str, monkeypatch: pytest.MonkeyPatch):
    database = Database(url)
    kept = Replies(database)
    assert kept.begin("me", "dead", "r") is None
    monkeypatch.setattr(replies, "GIVEN_UP_AFTER", timedelta(seconds=-1))
    assert kept.begin("me", "dead", "r") is None
    monkeypatch.setattr(replies, "KEPT_FOR", timedelta(seconds=-1))
    kept.begin("me", "next", "r")
    with database.reading() as session:
        assert session.execute(sa.text("SELECT key FROM idempotency")).scalars().all() == ["next"]
