"""Writing down what is seen, in batches, beside the requests that it is seen of."""

from __future__ import annotations

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

from serve.background import ended
from serve.experiments.events import Event, Exposure

log = logging.getLogger(__name__)

FLUSH_S = 0.2
MAX_WAITING = 50_000
"""Events kept while the database is away; older ones go first."""
MAX_REMEMBERED = 200_000
AT_ONCE = 500


class Recorder:
    """Takes events without waiting, and hands them to ``write``, which may block, every :data:`FLUSH_S`.

    A process that is killed loses what it had not written: the events of that time at most. What ``write`` refuses is
    tried again, in order. Used from one event loop.
    """

    def __init__(self, write: Callable[[Sequence[Event]], None], lost: Callable[[int], None] = lambda _: None) -> None:
        """``lost`` is told how many events had to be dropped."""
        self._write = write
        self._lost = lost
        self._waiting: list[Event] = []
        self._exposed: OrderedDict[tuple[str, int, str], None] = OrderedDict()
        self._turn = asyncio.Lock()
        self._task: asyncio.Task[None] | None = None

    def note(self, event: Event) -> None:
        """Write ``event`` down soon. A unit's exposure in a phase is written once."""
        if isinstance(event, Exposure):
            key = event.experiment, event.phase, event.unit
            if key in self._exposed:
                return
            self._exposed[key] = None
            if len(self._exposed) > MAX_REMEMBERED:
                self._exposed.popitem(last=False)
        self._waiting.append(event)
        if (excess := len(self._waiting) - MAX_WAITING) > 0:
            del self._waiting[:excess]
            self._lost(excess)

    async def flush(self) -> None:
        """Write down all that was noted before now. Raises what ``write`` raises."""
        async with self._turn:
            while self._waiting:
                batch = self._waiting[:AT_ONCE]
                await asyncio.to_thread(self._write, batch)
                written = set(map(id, batch))
                # Not by position: the oldest may have been dropped while these were written.
                self._waiting = [event for event in self._waiting if id(event) not in written]

    def start(self) -> None:
        self._task = asyncio.create_task(self._run())

    async def stop(self) -> None:
        """Write down what is left, and end."""
        await ended(self._task)
        await self._flush_or_warn()

    async def _run(self) -> None:
        while True:
            await asyncio.sleep(FLUSH_S)
            await self._flush_or_warn()

    async def _flush_or_warn(self) -> None:
        try:
            await self.flush()
        except Exception as error:  # the database may be back the next time; requests do not depend on it
            log.warning("%d events of experiments wait to be written: %s", len(self._waiting), type(error).__name__)
