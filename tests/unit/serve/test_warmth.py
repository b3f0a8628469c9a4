"""What a replica keeps ready: pins as the registry wants them, and routers told of what is held."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from lora_runtime.engine.fake import FakeConfig, FakeEngine
from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.errors import AdapterMissing
from serve import warmth
from serve.pins import PinFollower, pinned
from serve.registry.database import Database
from serve.registry.repository import Repository
from serve.warmth import Warmth


class Kept:
    """An engine with two slots for pins, and what routers were told."""

    def __init__(self) -> None:
        self.engine = FakeEngine(FakeConfig(max_slots=2))
        self.told: list[set[str]] = []
        self.gone: set[str] = set()
        self.warmth = Warmth(self.engine, self._locate, lambda held: self.told.append(set(held)))

    async def _locate(self, ref: AdapterRef) -> AdapterRef:
        if ref.version in self.gone:
            raise AdapterMissing("Its files are gone.")
        return ref

    def want(self, *versions: str) -> None:
        self.warmth.want({v: AdapterRef(version=v, path=f"/{v}", name=v) for v in versions})

    async def settled(self, *versions: str) -> None:
        await eventually(lambda: self.engine._pinned == set(versions))


async def eventually(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(5):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.fixture
async def kept(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Kept]:
    monkeypatch.setattr(warmth, "ANNOUNCE_S", 0.01)
    monkeypatch.setattr(warmth, "RETRY_S", 0.05)
    made = Kept()
    made.warmth.start()
    made.warmth.start()
    yield made
    await made.warmth.stop()


async def test_pins_follow_what_is_wanted(kept: Kept):
    kept.want("a", "b")
    await kept.settled("a", "b")
    kept.want("b")
    await kept.settled("b")
    kept.want()
    await kept.settled()
    assert kept.warmth.num_missing == 0


async def test_a_moved_pin_takes_the_slot_that_it_frees(kept: Kept):
    kept.want("a", "b")
    await kept.settled("a", "b")
    kept.want("a", "c")
    await kept.settled("a", "c")


async def test_a_pin_that_fails_is_tried_again_and_hinders_no_other(kept: Kept):
    kept.gone = {"a"}
    kept.want("a", "b")
    await kept.settled("b")
    assert kept.warmth.num_missing == 1
    kept.gone = set()
    await kept.settled("a", "b")


async def test_routers_hear_of_changes_only(kept: Kept):
    kept.want("a")
    await eventually(lambda: kept.told[-1:] == [{"a"}])
    await asyncio.sleep(0.1)
    count = len(kept.told)
    await asyncio.sleep(0.1)
    assert len(kept.told) == count <= 2


async def test_a_replica_learns_of_pins_from_the_registry(url: str, tmp_path: Path):
    repository = Repository(Database(url))
    repository.add("x", "1" * 64, "/1", {})
    seen: list[set[str]] = []
    follower = PinFollower(url, lambda pins: seen.append(set(pins)))
    follower.start()
    await eventually(lambda: seen == [set()])
    repository.set_alias("x", "prod", "1" * 64, pinned=True)
    await eventually(lambda: seen[-1] == {"1" * 64})
    repository.add("x", "2" * 64, "/2", {})
    repository.set_alias("x", "prod", "2" * 64)
    await eventually(lambda: seen[-1] == {"2" * 64})
    (ref,) = pinned(repository.adapters().values()).values()
    assert (ref.path, ref.name) == ("/2", "x")
    repository.remove("x")
    await eventually(lambda: seen[-1] == set())
    await follower.stop()


async def test_a_registry_that_is_away_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("serve.pins.CONNECT_RETRY_S", 0.05)
    (tmp_path / "in the way").write_text("")
    seen: list[object] = []
    follower = PinFollower(f"sqlite:///{tmp_path}/in the way/registry.db", seen.append)
    follower.start()
    await asyncio.sleep(0.3)
    assert not seen
    (tmp_path / "in the way").unlink()
    await eventually(lambda: bool(seen))
    await follower.stop()
