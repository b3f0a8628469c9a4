"""Slots of a vLLM engine: whoever holds a version finds it in its slot, whatever others do meanwhile."""

from __future__ import annotations

import asyncio
import random

import pytest

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.engine.vllm.residency import Residency
from lora_runtime.errors import AdapterRejected, InvalidCombination, Overloaded


def ref(version: str) -> AdapterRef:
    return AdapterRef(version=version, path=f"/{version}", name=version)


def refs(*versions: str) -> dict[str, AdapterRef]:
    return {version: ref(version) for version in versions}


class Slots:
    """What lies where. A fill asks several times, as one does that waits for its file, and others come in between;
    "bad" ones fail."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.content: dict[int, str] = {}
        self._delay_s = delay_s

    async def fill(self, slot: int, adapter: AdapterRef) -> None:
        for _ in range(random.randint(1, 4)):
            self.content.pop(slot, None)
            await asyncio.sleep(random.random() * self._delay_s / 4)
        if adapter.version.startswith("bad"):
            raise AdapterRejected("it does not fit")
        self.content[slot] = adapter.version


@pytest.mark.parametrize("seed", range(8))
async def test_what_is_held_is_in_its_slot(seed):
    """Random sets of versions, some of which cannot be loaded, and callers that leave at any moment."""
    chosen = random.Random(seed)
    slots = Slots(0.002)
    residency = Residency(3, slots.fill)
    names = ["a", "b", "c", "d", "e", "bad1", "bad2"]

    async def one() -> str:
        wanted = refs(*chosen.sample(names, chosen.randint(0, 3)))
        try:
            async with asyncio.timeout(chosen.choice([0.001, 0.01, 5.0])):
                async with residency.held(wanted) as held:
                    for _ in range(3):
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

    outcomes = [await asyncio.gather(*(one() for _ in range(60))) for _ in range(3)]
    assert {outcome for round_ in outcomes for outcome in round_} == {"served", "left", "rejected"}
    await asyncio.sleep(0.05)
    assert residency.table.num_held == 0 and residency.num_waiting == 0
    assert not [version for version in residency.table.resident if version.startswith("bad")]


async def test_a_caller_that_leaves_at_once_leaves_no_unfilled_slot_behind():
    slots = Slots(0.01)
    residency = Residency(1, slots.fill)

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
    residency = Residency(1, slots.fill)

    async def hold(version: str) -> str:
        async with residency.held(refs(version)):
            return version

    outcomes = await asyncio.gather(*(hold("bad") for _ in range(4)), hold("good"), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes[:4]] == [AdapterRejected] * 4 and outcomes[4] == "good"
    assert residency.table.resident == ("good",)


async def test_more_than_there_are_slots_is_refused_and_pins_stay():
    residency = Residency(2, Slots().fill)
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
    residency = Residency(1, Slots().fill, clock=lambda: now[0])
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
