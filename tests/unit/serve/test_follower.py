"""Following the registry: as new as it was when asked, whoever asks, and with few readings."""

from __future__ import annotations

import asyncio
import threading

import pytest

from serve.follower import Follower


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
