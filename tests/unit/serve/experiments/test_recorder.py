"""What was seen is written in batches, in order, and not lost while the database is away."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from datetime import UTC, datetime

import pytest

from serve.experiments import recorder as module
from serve.experiments.events import Event, Exposure, Outcome
from serve.experiments.recorder import Recorder


class Database:
    def __init__(self) -> None:
        self.batches: list[list[Event]] = []
        self.is_there = True

    def write(self, events: Sequence[Event]) -> None:
        if not self.is_there:
            raise ConnectionError
        self.batches.append(list(events))

    @property
    def written(self) -> list[Event]:
        return [event for batch in self.batches for event in batch]


def outcome(number: int) -> Outcome:
    return Outcome(request_id=f"r{number}", status=200)


def exposure(unit: str, phase: int = 1) -> Exposure:
    return Exposure(experiment="e", phase=phase, unit=unit, arm="a", request_id="r", at=datetime.now(UTC))


async def test_events_are_written_in_order_and_in_batches():
    database = Database()
    recorder = Recorder(database.write)
    events = [outcome(number) for number in range(module.AT_ONCE + 100)]
    for event in events:
        recorder.note(event)
    await recorder.flush()
    assert database.written == events and len(database.batches) == 2


async def test_a_unit_is_exposed_once_in_a_phase():
    database = Database()
    recorder = Recorder(database.write)
    for found in (exposure("u"), exposure("u"), exposure("v"), exposure("u", phase=2)):
        recorder.note(found)
    await recorder.flush()
    recorder.note(exposure("u"))
    await recorder.flush()
    assert [(e.unit, e.phase) for e in database.written if isinstance(e, Exposure)] == [("u", 1), ("v", 1), ("u", 2)]


async def test_what_could_not_be_written_is_written_later_and_nothing_twice():
    database = Database()
    recorder = Recorder(database.write)
    database.is_there = False
    recorder.note(outcome(1))
    with pytest.raises(ConnectionError):
        await recorder.flush()
    recorder.note(outcome(2))
    database.is_there = True
    await asyncio.gather(recorder.flush(), recorder.flush())
    assert database.written == [outcome(1), outcome(2)]


async def test_the_oldest_go_when_the_database_stays_away(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(module, "MAX_WAITING", 10)
    database, lost = Database(), []
    recorder = Recorder(database.write, lost.append)
    for number in range(25):
        recorder.note(outcome(number))
    await recorder.flush()
    assert database.written == [outcome(number) for number in range(15, 25)] and sum(lost) == 15


async def test_it_writes_by_itself_and_at_the_end():
    database = Database()
    recorder = Recorder(database.write)
    recorder.start()
    recorder.note(outcome(1))
    await asyncio.sleep(3 * module.FLUSH_S)
    assert database.written == [outcome(1)]
    recorder.note(outcome(2))
    await recorder.stop()
    assert database.written == [outcome(1), outcome(2)]
