"""Following the registry: as new as it was when asked, whoever asks, and with few readings."""

from __future__ import annotations

import asyncio
import math
import pickle
import threading

import pytest

from serve.follower import Follower
from serve.registry.errors import RegistryBusy, RegistryStale


class Registry:
    """A revision that moves, and can be out of reach; readings take a while."""

    def __init__(self) -> None:
        self.revision = 1
        self.num_readings = 0
        self.is_there = True
        self.go_on = threading.Event()
        self.go_on.set()

    def read(self) -> int:
        self.num_readings += 1
        found, is_there = self.revision, self.is_there
        assert self.go_on.wait(5)
        if not is_there:
            raise ConnectionError
        return found


async def test_those_who_come_while_it_is_read_share_the_next_reading():
    registry, seen = Registry(), []
    follower = Follower(registry.read)
    follower.add(lambda: seen.append(registry.revision))
    await follower.refresh()
    registry.go_on.clear()
    early = asyncio.create_task(follower.refresh())
    await asyncio.sleep(0.05)
    registry.revision = 2  # after the early reading began: it may not see this, the late ones must
    late = [asyncio.create_task(follower.refresh()) for _ in range(50)]
    await asyncio.sleep(0.05)
    registry.go_on.set()
    await asyncio.gather(early, *late)
    assert seen[-1] == 2
    assert registry.num_readings == 3


async def test_without_a_database_what_is_known_serves_on():
    registry = Registry()
    follower = Follower(registry.read)
    registry.is_there = False
    registry.go_on.clear()
    waiting = [asyncio.create_task(follower.refresh()) for _ in range(20)]
    await asyncio.sleep(0.05)
    registry.go_on.set()
    assert all(isinstance(e, ConnectionError) for e in await asyncio.gather(*waiting, return_exceptions=True))
    assert registry.num_readings <= 2, "who waits for a database that is gone waits once"
    await follower.catch_up()
    registry.is_there = True
    await follower.refresh()


async def test_a_reading_that_fails_while_reloading_is_made_again():
    registry, calls = Registry(), []

    def reload() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError

    follower = Follower(registry.read)
    follower.add(reload)
    with pytest.raises(ConnectionError):
        await follower.refresh()
    await follower.refresh()
    assert len(calls) == 2


async def test_a_reload_that_raises_stop_iteration_holds_nothing_up():
    """It cannot be raised through a future: whoever waits for one would wait for ever."""
    registry, calls = Registry(), []

    def reload() -> None:
        calls.append(1)
        if len(calls) == 1:
            raise StopIteration

    follower = Follower(registry.read)
    follower.add(reload)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await asyncio.wait_for(follower.refresh(), 5)
    await asyncio.wait_for(follower.refresh(), 5)
    assert len(calls) == 2


async def test_a_database_that_hangs_is_waited_for_so_long_only_by_one_thread():
    registry = Registry()
    follower = Follower(registry.read, limit_s=0.1)
    registry.go_on.clear()
    for _ in range(5):
        with pytest.raises(RegistryBusy):
            await asyncio.wait_for(follower.refresh(), 5)
    assert registry.num_readings == 1
    registry.go_on.set()
    await asyncio.wait_for(follower.refresh(), 5)
    assert registry.num_readings == 2
    await follower.stop()


async def test_who_gives_up_waiting_leaves_the_follower_usable():
    registry = Registry()
    follower = Follower(registry.read)
    registry.go_on.clear()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(follower.refresh(), 0.05)
    registry.go_on.set()
    await asyncio.wait_for(follower.refresh(), 5)


async def test_its_age_counts_from_the_last_reading_that_succeeded():
    registry, now = Registry(), [0.0]
    follower = Follower(registry.read, max_age_s=30, clock=lambda: now[0])
    with pytest.raises(RegistryStale):
        follower.check_fresh()
    await follower.refresh()
    now[0] = 30.0
    follower.check_fresh()
    registry.is_there = False
    await follower.catch_up()
    now[0] = 31.0
    with pytest.raises(RegistryStale, match=r"for 31 s, more than the 30 s of registry\.max_age_s") as stale:
        follower.check_fresh()
    assert pickle.loads(pickle.dumps(stale.value)).facts == {"retry_after_s": 5, "age_s": 31.0}
    registry.is_there = True
    await follower.refresh()
    follower.check_fresh()
    assert follower.age_s == 0


async def test_keys_are_read_even_where_a_later_reload_fails():
    registry, keys = Registry(), []
    follower = Follower(registry.read)
    follower.add(lambda: keys.append(registry.revision))

    def fail() -> None:
        raise KeyError("a row that nobody understands")

    follower.add(fail)
    for revision in (1, 2):
        registry.revision = revision
        await follower.catch_up()
    assert keys == [1, 2] and follower.age_s == math.inf
