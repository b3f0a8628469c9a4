"""Who is in which slot of a vLLM engine: leases in order of arrival, fills shared by all who wait for them."""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.engine.slots import Lease, Move, SlotTable
from lora_runtime.errors import Overloaded

PATIENCE_S = 1.0
"""How long the first in line waits for slots while later requests may still use those that are resident."""

Fill = Callable[[int, AdapterRef], Awaitable[None]]
"""Puts an adapter into a slot. Raises a LoomError, and then the slot is empty. May be cancelled, for another to
follow in that slot."""


@dataclass(slots=True, eq=False)
class _Waiter:
    refs: Mapping[str, AdapterRef]
    since: float
    lease: asyncio.Future[Lease] = field(default_factory=asyncio.Future)


class Residency:
    """Slots of one engine, used from one event loop. The only owner of what is resident."""

    def __init__(self, capacity: int, fill: Fill, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = SlotTable(capacity)
        self.counters: Counter[str] = Counter()
        self._fill = fill
        self._clock = clock
        self._waiting: deque[_Waiter] = deque()
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._broken: set[str] = set()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def is_ready(self, versions: Iterable[str]) -> bool:
        """Whether all of ``versions`` are in slots, and filled."""
        wanted = list(versions)
        return self.table.holds_all(wanted) and not any(version in self._filling for version in wanted)

    @asynccontextmanager
    async def held(self, refs: Mapping[str, AdapterRef]) -> AsyncIterator[Mapping[str, int]]:
        """Slots by version (the keys of ``refs``), filled and held while the context lasts.

        Raises InvalidCombination when they can never fit, and what a fill raised. A caller that is cancelled
        while it waits takes nothing.
        """
        self.table.check_fits(refs)
        lease = await self._acquire(refs)
        try:
            for version in lease.slots:
                if version in self._filling:
                    await asyncio.shield(self._filling[version])
            yield lease.slots
        finally:
            self._release(lease)

    async def pin(self, ref: AdapterRef) -> None:
        """Bring ``ref`` in and keep it. Raises Overloaded where every slot is taken."""
        self.table.check_fits([ref.version])
        if not self.table.can_acquire([ref.version]):
            raise Overloaded("Every slot is in use or pinned; try again shortly, or unpin one.", retry_after_s=1)
        async with self.held({ref.version: ref}):
            self.table.pin(ref.version)

    def unpin(self, version: str) -> None:
        self.table.unpin(version)
        self._admit()

    async def _acquire(self, refs: Mapping[str, AdapterRef]) -> Lease:
        waiter = _Waiter(refs, self._clock())
        self._waiting.append(waiter)
        self._admit()
        try:
            return await waiter.lease
        except asyncio.CancelledError:
            if waiter in self._waiting:
                self._waiting.remove(waiter)
            elif waiter.lease.done() and not waiter.lease.cancelled():
                self._release(waiter.lease.result())
            raise

    def _admit(self) -> None:
        """In order of arrival; one who cannot have all slots lets others pass that need only resident ones."""
        blocked: list[_Waiter] = []
        while self._waiting:
            waiter = self._waiting.popleft()
            if waiter.lease.cancelled():
                continue
            is_patient = not blocked or self._clock() - blocked[0].since < PATIENCE_S
            may_pass = not blocked or not waiter.refs or (is_patient and self.table.holds_all(waiter.refs))
            lease = self.table.acquire(waiter.refs) if may_pass else None
            if lease is None:
                blocked.append(waiter)
                continue
            # Started here and not by the waiter, who may be cancelled before it runs again: what the
            # table calls resident is filled or being filled, always.
            for move in lease.moves:
                self._start(move, waiter.refs[move.version])
            self.counters["slot_hits"] += len(lease.slots) - len(lease.moves)
            waiter.lease.set_result(lease)
        self._waiting.extend(blocked)

    def _release(self, lease: Lease) -> None:
        self.table.release(lease)
        for version in self._broken & set(lease.slots):
            self._forget(version)
        self._admit()

    def _forget(self, version: str) -> None:
        """Give up what could not be filled, once the last who waited for it has let go."""
        if self.table.discard(version) is not None:
            self._broken.discard(version)
            del self._filling[version]

    def _start(self, move: Move, ref: AdapterRef) -> None:
        # What left a slot while it was still being loaded must not go on loading there.
        obsolete = self._filling.pop(move.evicted, None) if move.evicted is not None else None
        task = asyncio.ensure_future(self._filled_after(obsolete, move.slot, ref))
        self._filling[move.version] = task
        self._broken.discard(move.version)
        self.counters["slot_loads"] += 1
        self.counters["slot_evictions"] += move.evicted is not None
        task.add_done_callback(lambda done: self._filled(move.version, done))

    async def _filled_after(self, obsolete: asyncio.Task[None] | None, slot: int, ref: AdapterRef) -> None:
        if obsolete is not None:
            obsolete.cancel()
            await asyncio.wait([obsolete])
        await self._fill(slot, ref)

    def _filled(self, version: str, task: asyncio.Task[None]) -> None:
        if self._filling.get(version) is not task:
            return  # it left its slot meanwhile
        if task.cancelled() or task.exception() is not None:
            self._broken.add(version)
            self._forget(version)
            self._admit()
        else:
            del self._filling[version]
