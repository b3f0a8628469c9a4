"""Slots of a vLLM engine: whoever holds a version finds it in its slot, whatever others do meanwhile."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Mapping

import pytest

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.engine.vllm import residency as module
from lora_runtime.engine.vllm.residency import Residency
from lora_runtime.errors import AdapterRejected, InvalidCombination, MemoryExceeded, Overloaded


def ref(version: str) -> AdapterRef:
    return AdapterRef(version=version, path=f"/{version}", name=version)


def refs(*versions: str) -> dict[str, AdapterRef]:
    return {version: ref(version) for version in versions}


class Slots:
    """What lies where. A fill asks several times, as one does that waits for its file, and others come in between;
    "bad" ones fail. A version takes as much of the memory as ``sizes`` says, else none."""

    def __init__(self, delay_s: float = 0.0, budget: int = 0, sizes: Mapping[str, int] | None = None) -> None:
        self.content: dict[int, str] = {}
        self.used: dict[int, tuple[str, int]] = {}
        self.num_fills = 0
        self._delay_s = delay_s
        self._budget = budget
        self._sizes = sizes or {}

    @property
    def num_used(self) -> int:
        return sum(size for _, size in self.used.values())

    async def fill(self, slot: int, adapter: AdapterRef) -> None:
        self.num_fills += 1
        for _ in range(random.randint(1, 4)):
            self.content.pop(slot, None)
            self.used.pop(slot, None)
            await asyncio.sleep(random.random() * self._delay_s / 4)
        if adapter.version.startswith("bad"):
            raise AdapterRejected("it does not fit")
        wanted = self._sizes.get(adapter.version, 0)
        if wanted + self.num_used > self._budget:
            used = [[slot, version, size] for slot, (version, size) in self.used.items()]
            raise MemoryExceeded("It is full.", wanted=wanted, used=used, budget=self._budget)
        self.used[slot] = adapter.version, wanted
        await asyncio.sleep(random.random() * self._delay_s / 4)
        self.content[slot] = adapter.version

    async def clear(self, slot: int) -> None:
        await asyncio.sleep(random.random() * self._delay_s / 4)
        self.content.pop(slot, None)
        self.used.pop(slot, None)


@pytest.mark.parametrize("seed", range(8))
async def test_what_is_held_is_in_its_slot(seed, monkeypatch):
    """Random sets of versions, some of which cannot be loaded, little memory, and callers that leave at any moment."""
    chosen = random.Random(seed)
    sizes = {"a": 3, "b": 3, "c": 3, "d": 4, "e": 1}
    slots = Slots(0.002, budget=7, sizes=sizes)
    monkeypatch.setattr(module, "ROOM_PATIENCE_S", 0.1)
    residency = Residency(3, slots.fill, slots.clear)
    names = ["a", "b", "c", "d", "e", "bad1", "bad2"]

    async def one() -> str:
        wanted = refs(*chosen.sample(names, chosen.randint(0, 3)))
        try:
            async with asyncio.timeout(chosen.choice([0.001, 0.01, 5.0])):
                async with residency.held(wanted) as held:
                    for _ in range(3):
                        assert slots.num_used <= 7
                        assert {version: slots.content[slot] for version, slot in held.items()} == {
                            v: v for v in wanted
                        }
                        await asyncio.sleep(chosen.random() * 0.003)
                    return "served"
        except TimeoutError:
            return "left"
        except AdapterRejected:
            assert any(version.startswith("bad") for version in wanted)
            return "rejected"
        except InvalidCombination:
            assert sum(sizes.get(version, 0) for version in wanted) > 7
            return "too much"
        except Overloaded:
            return "overloaded"

    outcomes = [await asyncio.gather(*(one() for _ in range(60))) for _ in range(3)]
    found = Counter(outcome for round_ in outcomes for outcome in round_)
    assert set(found) >= {"served", "left", "rejected"}
    assert found["overloaded"] < found["served"]
    await asyncio.sleep(0.05)
    assert residency.table.num_held == 0 and residency.num_waiting == 0
    assert not [version for version in residency.table.resident if version.startswith("bad")]


async def test_a_caller_that_leaves_at_once_leaves_no_unfilled_slot_behind():
    slots = Slots(0.01)
    residency = Residency(1, slots.fill, slots.clear)

    async def hold() -> None:
        async with residency.held(refs("a")):
            pass

    leaving = asyncio.create_task(hold())
    await asyncio.sleep(0)
    leaving.cancel()
    async with residency.held(refs("a")) as held:
        assert slots.content[held["a"]] == "a"


async def test_all_who_wait_for_a_bad_adapter_hear_why_and_the_next_version_is_served():
    slots = Slots(0.005)
    residency = Residency(1, slots.fill, slots.clear)

    async def hold(version: str) -> str:
        async with residency.held(refs(version)):
            return version

    outcomes = await asyncio.gather(*(hold("bad") for _ in range(4)), hold("good"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:4]] == [AdapterRejected] * 4 and outcomes[4] == "good"
    assert residency.table.resident == ("good",)


async def test_more_than_there_are_slots_is_refused_and_pins_stay():
    slots = Slots()
    residency = Residency(2, slots.fill, slots.clear)
    with pytest.raises(InvalidCombination):
        async with residency.held(refs("a", "b", "c")):
            pass
    await residency.pin(ref("a"))
    for version in "bcd":
        async with residency.held(refs(version)):
            assert "a" in residency.table.resident
            with pytest.raises(Overloaded):
                await residency.pin(ref("other"))
    residency.unpin("a")
    async with residency.held(refs("b", "c")):
        assert "a" not in residency.table.resident


async def test_the_first_in_line_is_not_passed_for_ever():
    """One slot in use by "a" again and again; "b" waits, and gets its turn once its patience is over."""
    now = [0.0]
    slots = Slots()
    residency = Residency(1, slots.fill, slots.clear, clock=lambda: now[0])
    order: list[str] = []

    async def hold(version: str, steps: int) -> None:
        async with residency.held(refs(version)):
            order.append(version)
            for _ in range(steps):
                await asyncio.sleep(0)

    first = asyncio.create_task(hold("a", 20))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    waiting = asyncio.create_task(hold("b", 1))
    await asyncio.sleep(0)
    passing = asyncio.create_task(hold("a", 1))
    await asyncio.sleep(0)
    now[0] = 5.0
    late = asyncio.create_task(hold("a", 1))
    await asyncio.gather(first, waiting, passing, late)
    assert order == ["a", "a", "b", "a"]


async def test_what_nobody_holds_leaves_the_memory_least_recently_used_first():
    slots = Slots(budget=10, sizes={"a": 4, "b": 4, "c": 4, "d": 9, "huge": 11})
    residency = Residency(8, slots.fill, slots.clear)
    for version in "abac":
        async with residency.held(refs(version)):
            pass
    assert set(slots.content.values()) == {"a", "c"} and residency.table.resident == ("a", "c")
    async with residency.held(refs("lora")):
        assert set(slots.content.values()) == {"a", "c", "lora"}
    async with residency.held(refs("d")):
        assert set(slots.content.values()) == {"lora", "d"}
    before = dict(slots.content)
    with pytest.raises(AdapterRejected, match="saved_bytes"):
        async with residency.held(refs("huge")):
            pass
    assert slots.content == before, "nothing leaves for what can never fit"


async def test_what_is_asked_for_together_must_fit_together():
    slots = Slots(budget=10, sizes={"a": 6, "b": 6, "c": 3})
    residency = Residency(8, slots.fill, slots.clear)
    with pytest.raises(InvalidCombination, match="saved_bytes"):
        async with residency.held(refs("a", "b")):
            pass
    assert residency.table.num_held == 0
    async with residency.held(refs("b", "c")):
        pass
    await residency.pin(ref("a"))
    with pytest.raises(InvalidCombination, match="unpin"):
        async with residency.held(refs("b")):
            pass
    residency.unpin("a")
    async with residency.held(refs("b")):
        assert "a" not in residency.table.resident


class AtOnce(Slots):
    """A fill whose file was read before: it is refused by the first call, before any other fill is called."""

    async def fill(self, slot: int, adapter: AdapterRef) -> None:
        self.num_fills += 1
        self.used.pop(slot, None)
        wanted = self._sizes[adapter.version]
        if wanted + self.num_used > self._budget:
            used = [[slot, version, size] for slot, (version, size) in self.used.items()]
            raise MemoryExceeded("It is full.", wanted=wanted, used=used, budget=self._budget)
        self.used[slot] = adapter.version, wanted
        self.content[slot] = adapter.version


@pytest.mark.parametrize("order", ["ab", "ba"])
async def test_what_another_left_in_a_slot_is_not_counted_as_the_next_ones(order):
    """The slot of "b" still holds "old" when "a" is refused: together "a" and "b" fit."""
    slots = AtOnce(budget=10, sizes={"old": 6, "older": 4, "a": 5, "b": 4})
    residency = Residency(2, slots.fill, slots.clear)
    for version in ("old", "older") if order == "ab" else ("older", "old"):
        async with residency.held(refs(version)):
            pass
    async with asyncio.timeout(1):
        async with residency.held(refs("a", "b")) as held:
            assert {version: slots.content[slot] for version, slot in held.items()} == {"a": "a", "b": "b"}
    assert slots.num_used == 9


async def test_memory_in_use_is_waited_for_and_not_for_ever(monkeypatch):
    slots = Slots(budget=10, sizes={"a": 6, "b": 6})
    residency = Residency(8, slots.fill, slots.clear)
    done = asyncio.Event()

    async def hold(version: str, until: asyncio.Event | None = None) -> str:
        async with residency.held(refs(version)):
            if until:
                await until.wait()
            return version

    first = asyncio.create_task(hold("a", done))
    await asyncio.sleep(0.02)
    second = asyncio.create_task(hold("b"))
    await asyncio.sleep(0.02)
    assert not second.done() and slots.num_fills == 2, "it is not read again and again meanwhile"
    done.set()
    assert await asyncio.gather(first, second) == ["a", "b"]
    monkeypatch.setattr(module, "ROOM_PATIENCE_S", 0.01)
    done.clear()
    first = asyncio.create_task(hold("b", done))
    await asyncio.sleep(0.01)
    with pytest.raises(Overloaded, match="in use"):
        await hold("a")
    done.set()
    assert await first == "b" and await hold("a") == "a"


async def test_who_joins_what_was_loaded_for_too_much_is_served_all_the_same():
    slots = Slots(budget=10, sizes={"a": 6, "b": 6})
    residency = Residency(8, slots.fill, slots.clear)

    async def hold(*versions: str) -> tuple[str, ...]:
        async with residency.held(refs(*versions)):
            return versions

    outcomes = await asyncio.gather(hold("a", "b"), hold("a"), hold("b"), return_exceptions=True)
    assert isinstance(outcomes[0], InvalidCombination) and outcomes[1:] == [("a",), ("b",)]
    assert residency.table.num_held == 0
