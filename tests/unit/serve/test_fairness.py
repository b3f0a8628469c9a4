"""Turns at an engine: bounded, in order within a tenant, fair between them, and none is ever lost."""

from __future__ import annotations

import asyncio
import random

import pytest

from lora_runtime.errors import Overloaded
from serve.fairness import FairQueue


class Watched(FairQueue):
    """Remembers in which order turns were given."""

    def __init__(self, width: int, max_waiting: int) -> None:
        super().__init__(width, max_waiting)
        self.joined: list = []
        self.granted: list = []

    def _join(self, waiter) -> None:
        super()._join(waiter)
        self.joined.append(waiter)

    def _grant(self) -> None:
        super()._grant()
        for waiter in self.joined:
            granted = waiter.granted
            is_in = granted.done() and not granted.cancelled() and granted.exception() is None
            if is_in and waiter not in self.granted:
                self.granted.append(waiter)


class Crowd:
    """Requests at one queue, which stay inside until they are let go."""

    def __init__(self, queue: FairQueue) -> None:
        self.queue = queue
        self.inside: list[str] = []
        self.log: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}

    async def arrive(self, *names: str, cost: int = 1) -> None:
        """``a1`` is the first request of tenant ``a``."""
        for name in names:
            self.leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._visit(name, cost))
            await asyncio.sleep(0)

    async def _visit(self, name: str, cost: int) -> str:
        try:
            async with self.queue.turn(name[0], cost):
                self.inside.append(name)
                self.log.append(name)
                await self.leave[name].wait()
                self.inside.remove(name)
        except Overloaded:
            return "refused"
        return "served"

    async def go(self, *names: str) -> None:
        for name in names:
            self.leave[name].set()
            await self.tasks[name]
        await asyncio.sleep(0)


async def test_no_more_than_its_width_is_inside():
    crowd = Crowd(FairQueue(width=2, max_waiting=10))
    await crowd.arrive("a1", "a2", "a3")
    assert crowd.inside == ["a1", "a2"] and crowd.queue.num_waiting == 1
    await crowd.go("a1")
    assert crowd.inside == ["a2", "a3"]
    await crowd.go("a2", "a3")
    assert (crowd.queue.num_inside, crowd.queue.num_waiting) == (0, 0)


async def test_the_next_turn_is_who_has_least():
    crowd = Crowd(FairQueue(width=2, max_waiting=100))
    await crowd.arrive(*(f"a{number}" for number in range(9)), "b1", "b2", "c1")
    await crowd.go("a0", "a1")
    assert crowd.inside == ["b1", "c1"], "not behind the seven that came before"
    await crowd.go("b1")
    assert crowd.inside == ["c1", "a2"], "of equals, whose last turn is longest ago"
    await crowd.go("c1")
    assert crowd.inside == ["a2", "b2"]


async def test_a_full_queue_drops_the_last_of_the_longest():
    crowd = Crowd(FairQueue(width=1, max_waiting=3))
    await crowd.arrive("a1", "a2", "a3", "a4", "a5")
    assert await crowd.tasks["a5"] == "refused", "who has most waiting gets no more"
    await crowd.arrive("b1")
    assert await crowd.tasks["a4"] == "refused" and not crowd.tasks["b1"].done()
    await crowd.arrive("b2")
    assert await crowd.tasks["b2"] == "refused", "two of a wait, and two of b would"
    await crowd.go("a1", "b1", "a2", "a3")
    assert crowd.log == ["a1", "b1", "a2", "a3"]


async def test_nobody_waits_where_there_is_room():
    crowd = Crowd(FairQueue(width=3, max_waiting=0))
    await crowd.arrive("a1", "a2", "a3", "b1")
    assert crowd.inside == ["a1", "a2", "a3"] and await crowd.tasks["b1"] == "refused"


async def test_what_is_wide_waits_until_it_fits_and_is_not_passed():
    crowd = Crowd(FairQueue(width=4, max_waiting=10))
    await crowd.arrive("a1", "a2")
    await crowd.arrive("b1", cost=9)
    await crowd.arrive("c1")
    assert crowd.inside == ["a1", "a2"]
    await crowd.go("a1", "a2")
    assert crowd.inside == ["b1"]
    await crowd.go("b1")
    assert crowd.inside == ["c1"]


async def test_who_gives_up_frees_the_place_whenever_that_is():
    queue = FairQueue(width=1, max_waiting=10)
    crowd = Crowd(queue)
    await crowd.arrive("a1", "b1", "c1")
    crowd.tasks["b1"].cancel()
    crowd.leave["a1"].set()
    await asyncio.sleep(0)
    crowd.tasks["c1"].cancel()
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert (queue.num_inside, queue.num_waiting) == (0, 0)
    await crowd.arrive("d1")
    assert crowd.inside[-1] == "d1"


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_happens_nothing_is_lost(seed: int):
    """Random arrivals, departures and cancellations; bounds hold all along, and all is empty at the end."""
    dice = random.Random(seed)
    width, max_waiting = dice.randint(1, 6), dice.randint(0, 8)
    queue = Watched(width, max_waiting)
    inside = 0

    async def visit(tenant: str, cost: int) -> None:
        nonlocal inside
        async with queue.turn(tenant, cost):
            inside += cost
            assert inside <= width or inside == cost
            try:
                await asyncio.sleep(dice.random() * 0.003)
            finally:
                inside -= cost

    tasks = []
    for _ in range(200):
        tenant = dice.choice("aaaabc")
        tasks.append(asyncio.create_task(visit(tenant, dice.choice([1, 1, 1, 2, 9]))))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() * 0.002)
        if dice.random() < 0.1:
            dice.choice(tasks).cancel()
        assert queue.num_waiting <= max_waiting + 1
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(o is None or isinstance(o, Overloaded | asyncio.CancelledError) for o in outcomes)
    for tenant in "abc":
        turns = [queue.joined.index(waiter) for waiter in queue.granted if waiter.tenant == tenant]
        assert turns == sorted(turns), "each tenant's in order"
    assert (queue.num_inside, queue.num_waiting, inside) == (0, 0, 0)
    assert not queue._inside and not queue._waiting and not queue._last_turn


async def test_one_busy_tenant_leaves_the_others_their_share():
    """Five requests of others each meet a queue full of one tenant's: each waits for one turn, not for forty."""
    queue = FairQueue(width=4, max_waiting=40)
    turns = 0

    async def visit(tenant: str) -> int:
        nonlocal turns
        begun = turns
        async with queue.turn(tenant):
            turns += 1
            await asyncio.sleep(0.001)
            return turns - begun

    hot = [asyncio.create_task(visit("hot")) for _ in range(44)]
    await asyncio.sleep(0)
    waits = await asyncio.gather(*(visit(f"quiet{number}") for number in range(5)))
    assert max(waits) <= 9
    outcomes = await asyncio.gather(*hot, return_exceptions=True)
    assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 5, "their places were the hot one's last"


async def test_spare_requests_take_half_of_the_places_at_most():
    queue = FairQueue(4, 8)
    with queue.spare(), queue.spare() as second:
        with pytest.raises(Overloaded, match="no room to spare"), queue.spare():
            raise AssertionError("it went in")
        assert queue.num_inside == 2 and not second.is_set()
    assert queue.num_inside == 0
    async with queue.turn("a", 2):
        with pytest.raises(Overloaded), queue.spare(3):
            raise AssertionError("it went in")


async def test_spare_requests_leave_as_soon_as_anybody_waits():
    queue, crowd = (queue := FairQueue(4, 8)), Crowd(queue)
    with queue.spare(2) as given_up:
        await crowd.arrive("a1", "a2")
        assert crowd.inside == ["a1", "a2"] and not given_up.is_set(), "there was room beside it"
        await crowd.arrive("b1")
        assert crowd.inside == ["a1", "a2"] and given_up.is_set()
        with pytest.raises(Overloaded), queue.spare():
            raise AssertionError("it went in before who waits")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert crowd.inside == ["a1", "a2", "b1"]
    for event in crowd.leave.values():
        event.set()
    await asyncio.gather(*crowd.tasks.values())
    assert queue.num_inside == 0
