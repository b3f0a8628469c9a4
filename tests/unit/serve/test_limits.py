"""Limits of API keys: counted in, counted out, in this process and in Redis, and no reason to be down."""

from __future__ import annotations

import asyncio
import os
import uuid

import pytest

from serve.identity import ANYONE, Identity, Scope
from serve.limits import KeyLimits, RateLimited

REDIS = os.environ.get("LOOM_TEST_REDIS", "redis://127.0.0.1:6379")


def identity(**limits: int) -> Identity:
    return Identity(id=uuid.uuid4().hex[:12], name="x", scopes=frozenset(Scope), **limits)


@pytest.fixture(params=["memory", "redis"])
def storage(request: pytest.FixtureRequest) -> str:
    if request.param == "memory":
        return "memory://"
    import redis

    try:
        redis.Redis.from_url(REDIS, socket_connect_timeout=2).ping()
    except redis.exceptions.RedisError as error:
        pytest.skip(f"no Redis to test on (LOOM_TEST_REDIS): {type(error).__name__}")
    return REDIS


async def test_rates_are_counted_by_key(storage: str):
    limits, one, other = KeyLimits(storage), identity(requests_per_minute=3), identity(requests_per_minute=3)
    for _ in range(3):
        (await limits.enter(one))()
    with pytest.raises(RateLimited, match="3 requests a minute") as refused:
        await limits.enter(one)
    assert 1 <= refused.value.facts["retry_after_s"] <= 61
    (await limits.enter(other))()


async def test_gateways_share_what_redis_counts(storage: str):
    if storage == "memory://":
        pytest.skip("memory is each process's own")
    one = identity(requests_per_minute=1)
    (await KeyLimits(storage).enter(one))()
    with pytest.raises(RateLimited):
        await KeyLimits(storage).enter(one)


async def test_what_runs_at_once_is_bounded_and_comes_free(storage: str):
    limits, one = KeyLimits(storage), identity(max_concurrent=2)
    first, second = await limits.enter(one), await limits.enter(one)
    with pytest.raises(RateLimited, match="2 requests running"):
        await limits.enter(one)
    first()
    third = await limits.enter(one)
    second()
    third()
    assert not limits._running


async def test_a_request_over_its_rate_is_not_left_running():
    limits, one = KeyLimits("memory://"), identity(requests_per_minute=1, max_concurrent=1)
    (await limits.enter(one))()
    for _ in range(3):
        with pytest.raises(RateLimited, match="a minute"):
            await limits.enter(one)
    assert not limits._running


async def test_no_more_run_at_once_than_may_however_many_ask(storage: str):
    limits, one = KeyLimits(storage), identity(max_concurrent=5, requests_per_minute=10_000)
    most = running = 0

    async def ask() -> None:
        nonlocal most, running
        try:
            leave = await limits.enter(one)
        except RateLimited:
            return
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.001)
        running -= 1
        leave()

    await asyncio.gather(*(ask() for _ in range(200)))
    assert most == 5 and not limits._running


async def test_nobody_is_limited_who_has_no_limits():
    limits = KeyLimits("memory://")
    for _ in range(100):
        await limits.enter(ANYONE)


async def test_a_storage_that_is_down_lets_requests_through(caplog: pytest.LogCaptureFixture):
    leave = await KeyLimits("redis://127.0.0.1:9").enter(identity(requests_per_minute=1))
    leave()
    assert "rates are not limited" in caplog.text
