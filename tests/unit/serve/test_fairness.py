"""Turns at an engine: bounded, fair between callers and then between adapters, in order, and none is ever lost."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections import Counter, deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.errors import Overloaded
from serve.fairness import FairQueue


class Crowd:
    """Requests at one queue, which stay inside until they are let go."""

    def __init__(self, queue: FairQueue, *, as_callers: bool = False) -> None:
        self.queue = queue
        self.inside: list[str] = []
        self.log: list[str] = []
        self.leave: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[str]] = {}
        self._as_callers = as_callers

    async def arrive(self, *names: str, cost: int = 1) -> None:
        """``a1`` is the first request for adapter ``a``, ``ab1`` for both, ``ann:ab1`` by caller ``ann``."""
        for name in names:
            self.leave[name] = asyncio.Event()
            self.tasks[name] = asyncio.create_task(self._visit(name, cost))
            await asyncio.sleep(0)

    async def _visit(self, name: str, cost: int) -> str:
        caller, _, asked = name.rpartition(":")
        adapters = [char for char in asked if char.isalpha()]
        if self._as_callers:
            (caller,), adapters = adapters, []
        try:
            async with self.queue.turn(caller, adapters, cost):
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


@pytest.fixture(params=["adapters", "callers"])
def crowd_at(request):
    """What holds between the adapters of a caller holds between callers."""
    return lambda width, max_waiting: Crowd(FairQueue(width, max_waiting), as_callers=request.param == "callers")


async def test_no_more_than_its_width_is_inside(crowd_at):
    crowd = crowd_at(width=2, max_waiting=10)
    await crowd.arrive("a1", "a2", "a3")
    assert crowd.inside == ["a1", "a2"] and crowd.queue.num_waiting == 1
    await crowd.go("a1")
    assert crowd.inside == ["a2", "a3"]
    await crowd.go("a2", "a3")
    assert (crowd.queue.num_inside, crowd.queue.num_waiting) == (0, 0)


async def test_the_next_turn_is_who_has_least(crowd_at):
    crowd = crowd_at(width=2, max_waiting=100)
    await crowd.arrive(*(f"a{number}" for number in range(9)), "b1", "b2", "c1")
    await crowd.go("a0", "a1")
    assert crowd.inside == ["b1", "c1"], "not behind the seven that came before"
    await crowd.go("b1")
    assert crowd.inside == ["c1", "a2"], "of equals, whose last turn is longest ago"
    await crowd.go("c1")
    assert crowd.inside == ["a2", "b2"]


async def test_a_full_queue_drops_the_last_of_the_longest(crowd_at):
    crowd = crowd_at(width=1, max_waiting=3)
    await crowd.arrive("a1", "a2", "a3", "a4", "a5")
    assert await crowd.tasks["a5"] == "refused", "who has most waiting gets no more"
    await crowd.arrive("b1")
    assert await crowd.tasks["a4"] == "refused" and not crowd.tasks["b1"].done()
    await crowd.arrive("b2")
    assert await crowd.tasks["b2"] == "refused", "two of a wait, and two of b would"
    await crowd.go("a1", "b1", "a2", "a3")
    assert crowd.log == ["a1", "b1", "a2", "a3"]


async def test_nobody_waits_where_there_is_room(crowd_at):
    crowd = crowd_at(width=3, max_waiting=0)
    await crowd.arrive("a1", "a2", "a3", "b1")
    assert crowd.inside == ["a1", "a2", "a3"] and await crowd.tasks["b1"] == "refused"


async def test_what_is_wide_waits_until_it_fits_and_is_not_passed(crowd_at):
    crowd = crowd_at(width=4, max_waiting=10)
    await crowd.arrive("a1", "a2")
    await crowd.arrive("b1", cost=9)
    await crowd.arrive("c1")
    assert crowd.inside == ["a1", "a2"]
    await crowd.go("a1", "a2")
    assert crowd.inside == ["b1"]
    await crowd.go("b1")
    assert crowd.inside == ["c1"]


async def test_who_gives_up_frees_the_place_whenever_that_is(crowd_at):
    crowd = crowd_at(width=1, max_waiting=10)
    await crowd.arrive("a1", "b1", "c1")
    crowd.tasks["b1"].cancel()
    crowd.leave["a1"].set()
    await asyncio.sleep(0)
    crowd.tasks["c1"].cancel()
    await asyncio.gather(*crowd.tasks.values(), return_exceptions=True)
    assert (crowd.queue.num_inside, crowd.queue.num_waiting) == (0, 0)
    await crowd.arrive("d1")
    assert crowd.inside[-1] == "d1"


async def test_callers_come_before_adapters():
    crowd = Crowd(FairQueue(width=1, max_waiting=100))
    await crowd.arrive(*(f"ann:{adapter}1" for adapter in "abcdef"), "bob:a1", "bob:a2", "bob:b1")
    served = []
    while crowd.inside:
        served.append(crowd.inside[0])
        await crowd.go(crowd.inside[0])
    assert served[:6] == ["ann:a1", "bob:a1", "ann:b1", "bob:b1", "ann:c1", "bob:a2"], "one each, however many adapters"
    assert served[6:] == ["ann:d1", "ann:e1", "ann:f1"], "and no place stays empty"


async def test_a_full_queue_drops_of_the_caller_with_most_waiting_from_its_longest_adapter():
    crowd = Crowd(FairQueue(width=1, max_waiting=5))
    await crowd.arrive("ann:z1", "ann:a1", "ann:b1", "ann:b2", "ann:c1", "bob:b1")
    await crowd.arrive("bob:b2")
    assert await crowd.tasks["ann:b2"] == "refused", "four of ann wait: her longest queue loses its last"
    await crowd.arrive("bob:b3")
    assert await crowd.tasks["bob:b3"] == "refused", "three of ann wait, and three of bob would"
    await crowd.arrive("bob:c1")
    assert await crowd.tasks["bob:b2"] == "refused", "his own queue for b was longer by two"
    await crowd.arrive("ann:a2")
    assert await crowd.tasks["ann:a2"] == "refused", "no adapter of hers has more waiting"
    await crowd.arrive("cyd:b1")
    assert await crowd.tasks["ann:a1"] == "refused" and not crowd.tasks["cyd:b1"].done(), "three of ann wait"


async def test_a_combination_waits_with_its_busiest_member():
    crowd = Crowd(FairQueue(width=1, max_waiting=100))
    await crowd.arrive("h1", "h2", "h3", "hq1", "qh2", "q1")
    await crowd.go("h1")
    assert crowd.inside == ["q1"], "the combinations wait behind h, and q has no more waiting for them"
    await crowd.go("q1", "h2", "h3")
    assert crowd.inside == ["hq1"]


COMBINATIONS = ["".join(c) for size in range(1, 9) for c in itertools.combinations("abcdefgh", size)]


@pytest.mark.parametrize("asked", [["a"], list("abcdefgh"), COMBINATIONS], ids=["one", "eight", "combinations"])
@pytest.mark.parametrize("has_keys", [False, True])
async def test_spreading_requests_over_combinations_gets_nobody_more(asked: list[str], has_keys: bool):
    """240 requests at a time, over one adapter or all 255 combinations of eight: who asks for one other gets as many
    turns as each of the adapters, or as the other caller."""
    width, shares = 24, 2 if has_keys else min(len(asked), 8) + 1
    queue, served, refused = FairQueue(width, 128), Counter[str](), Counter[str]()
    inside: deque[asyncio.Event] = deque()
    left = asyncio.Event()

    async def client(who: str, adapters: list[str]) -> None:
        for adapter in itertools.cycle(adapters):
            try:
                async with queue.turn(who if has_keys else "", adapter if who == "greedy" else [adapter]):
                    done = asyncio.Event()
                    inside.append(done)
                    await done.wait()
                    served[who] += 1
            except Overloaded:
                refused[who] += 1
                await left.wait()

    clients = [client("greedy", asked[number % len(asked) :] + asked[: number % len(asked)]) for number in range(240)]
    tasks = [asyncio.create_task(one) for one in clients]
    tasks += [asyncio.create_task(client("honest", ["honest"])) for _ in range(2 * width // shares + 1)]
    try:
        for _ in range(600):
            while len(inside) < width:
                await asyncio.sleep(0)
            inside.popleft().set()
            left.set()
            left = asyncio.Event()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert not refused["honest"]
    assert served["honest"] > 0.8 * served.total() / shares
    assert (queue.num_inside, queue.num_waiting, queue._callers) == (0, 0, {})


async def test_one_busy_tenant_leaves_the_others_their_share():
    """Five requests of others each meet a queue full of one tenant's: each waits for one turn, not for forty."""
    for hot_caller in ("", "hot"):
        queue = FairQueue(width=4, max_waiting=40)
        turns = 0

        async def visit(caller: str, adapter: str, queue: FairQueue = queue) -> int:
            nonlocal turns
            begun = turns
            async with queue.turn(caller, [adapter]):
                turns += 1
                await asyncio.sleep(0.001)
                return turns - begun

        hot = [asyncio.create_task(visit(hot_caller, "hot")) for _ in range(44)]
        await asyncio.sleep(0)
        waits = await asyncio.gather(*(visit("", f"quiet{number}") for number in range(5)))
        assert max(waits) <= (9 if not hot_caller else 12)
        outcomes = await asyncio.gather(*hot, return_exceptions=True)
        assert sum(isinstance(outcome, Overloaded) for outcome in outcomes) == 5, "their places were the hot one's last"


async def test_newcomers_without_end_keep_nobody_waiting(crowd_at):
    crowd = crowd_at(width=1, max_waiting=100)
    await crowd.arrive("a1", "a2")
    newcomers = iter("bcdefghijklmnop")
    await crowd.arrive(f"{next(newcomers)}1")
    while crowd.inside != ["a2"]:
        await crowd.arrive(f"{next(newcomers)}1")
        await crowd.go(crowd.inside[0])
    assert len(crowd.log) <= 5


CALLERS, ADAPTERS = st.sampled_from(["", "ann", "bob"]), st.sets(st.sampled_from("abcd"), max_size=3)
ARRIVALS = st.tuples(st.just("arrive"), CALLERS, ADAPTERS, st.sampled_from([1, 1, 1, 2, 9]))
EVENTS = st.one_of(
    ARRIVALS,
    ARRIVALS,
    st.tuples(st.sampled_from(["leave", "cancel", "spare", "end spare", "pause"]), st.integers(0, 1 << 16)),
)


@settings(max_examples=200, deadline=None)
@given(width=st.integers(1, 6), max_waiting=st.integers(0, 8), events=st.lists(EVENTS, max_size=80))
def test_whatever_happens_nothing_is_lost(width: int, max_waiting: int, events: list[tuple]) -> None:
    asyncio.run(_anything(width, max_waiting, events))


async def _anything(width: int, max_waiting: int, events: list[tuple]) -> None:
    """Bounds hold all along, no place stays empty while somebody waits for one, and all is empty at the end."""
    queue = FairQueue(width, max_waiting)
    tasks: list[asyncio.Task[None]] = []
    inside: dict[asyncio.Event, int] = {}
    spares: list[tuple] = []

    async def visit(caller: str, adapters: set[str], cost: int) -> None:
        async with queue.turn(caller, adapters, cost):
            done = asyncio.Event()
            inside[done] = cost
            try:
                await done.wait()
            finally:
                del inside[done]

    for kind, *what in events:
        if kind == "arrive":
            tasks.append(asyncio.create_task(visit(*what)))
        elif kind == "leave" and inside:
            list(inside)[what[0] % len(inside)].set()
        elif kind == "cancel" and tasks:
            tasks[what[0] % len(tasks)].cancel()
        elif kind == "spare":
            context = queue.spare(1 + what[0] % 2)
            try:
                spares.append((context, context.__enter__()))
            except Overloaded:
                assert queue.num_waiting or 2 * (queue.num_inside + 1 + what[0] % 2) > width
        elif kind == "end spare" and spares:
            spares.pop(what[0] % len(spares))[0].__exit__(None, None, None)
        else:
            for _ in range(4):
                await asyncio.sleep(0)
            taken = sum(inside.values())
            assert taken <= width or len(inside) == 1
            assert queue.num_waiting <= max_waiting + 1
            waiting = sum(not task.done() for task in tasks) - len(inside)
            assert queue.num_waiting == waiting
            if waiting:
                assert all(given_up.is_set() for _, given_up in spares)
                heads = [a.queue[0] for c in queue._callers.values() for a in c.adapters.values() if a.queue]
                assert not all(queue._fits(head.cost) for head in heads), "a place is empty, and somebody waits"
    for context, _ in spares:
        context.__exit__(None, None, None)
    for _ in range(10_000):
        if all(task.done() for task in tasks):
            break
        for done in list(inside):
            done.set()
        await asyncio.sleep(0)
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(o is None or isinstance(o, Overloaded | asyncio.CancelledError) for o in outcomes)
    assert (queue.num_inside, queue.num_waiting, queue._callers, inside) == (0, 0, {}, {})


@pytest.mark.parametrize("seed", range(10))
async def test_each_queue_is_in_order_and_nobody_starves(seed: int):
    """However requests arrive, one waits for no more turns than there can be between two of its queue, for each that
    was in front of it."""
    dice = random.Random(seed)
    queue = FairQueue(1, 60)
    order: dict[tuple[str, str], list[int]] = {}
    worst = 0

    async def visit(number: int, caller: str, adapter: str) -> None:
        nonlocal worst
        known = queue._callers.get(caller)
        ahead = len(known.adapters[adapter].queue) if known and adapter in known.adapters else 0
        begun = queue._num_turns
        try:
            async with queue.turn(caller, [adapter]):
                order.setdefault((caller, adapter), []).append(number)
                # Two callers, of four adapters each, take turns; and one had its turn already.
                worst = max(worst, queue._num_turns - begun - (ahead + 1) * 2 * 4 - 1)
                await asyncio.sleep(dice.random() * 0.002)
        except Overloaded:
            return

    tasks = []
    for number in range(400):
        tasks.append(asyncio.create_task(visit(number, dice.choice(["ann", "bob"]), dice.choice("aaaaaabcd"))))
        if dice.random() < 0.3:
            await asyncio.sleep(dice.random() * 0.002)
    await asyncio.gather(*tasks)
    assert all(numbers == sorted(numbers) for numbers in order.values())
    assert worst <= 0


async def test_spare_requests_take_half_of_the_places_at_most():
    queue = FairQueue(4, 8)
    with queue.spare(), queue.spare() as second:
        with pytest.raises(Overloaded, match="no room to spare"), queue.spare():
            raise AssertionError("it went in")
        assert queue.num_inside == 2 and not second.is_set()
    assert queue.num_inside == 0
    async with queue.turn("a", cost=2):
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
