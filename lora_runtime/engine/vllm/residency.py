"""Who is in which slot of a vLLM engine: leases in order of arrival, fills shared by all who wait for them.

Slots are few, and so is the memory for saved modules, which a worker counts: what it refuses for want of memory is
filled again once enough of what nobody holds has left.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial

from lora_runtime.engine.protocol import AdapterRef
from lora_runtime.engine.slots import Lease, Move, SlotTable
from lora_runtime.errors import AdapterRejected, InvalidCombination, MemoryExceeded, Overloaded

log = logging.getLogger(__name__)

PATIENCE_S = 1.0
"""How long the first in line waits for slots while later requests may still use those that are resident."""

ROOM_PATIENCE_S = 5.0
"""How long an adapter waits for those in use to leave the memory that it needs."""

MAX_REFUSALS = 8
"""Of one adapter for want of memory: others may take what was made free for it."""

Fill = Callable[[int, AdapterRef], Awaitable[None]]
"""Puts an adapter into a slot, and first of all takes out what is there: a call that is made later finds that gone.
Raises a LoomError, and then the slot is empty; MemoryExceeded where what is in the other slots leaves no room, with
slot, version and size of each as ``used``. May be cancelled, for another to follow in that slot."""

Clear = Callable[[int], Awaitable[None]]
"""Empties a slot."""


@dataclass(slots=True, eq=False)
class _Waiter:
    refs: Mapping[str, AdapterRef]
    since: float
    lease: asyncio.Future[Lease] = field(default_factory=asyncio.Future)


class _TooMuchTogether(Exception):
    """``version`` can never be filled beside the others of ``beside``, all asked for by one caller."""

    def __init__(self, version: str, beside: frozenset[str], reason: InvalidCombination) -> None:
        super().__init__(reason.message)
        self.version = version
        self.beside = beside
        self.reason = reason


class Residency:
    """Slots of one engine, used from one event loop. The only owner of what is resident."""

    def __init__(self, capacity: int, fill: Fill, clear: Clear, clock: Callable[[], float] = time.monotonic) -> None:
        self.table = SlotTable(capacity)
        self.counters: Counter[str] = Counter()
        self._fill = fill
        self._clear = clear
        self._clock = clock
        self._waiting: deque[_Waiter] = deque()
        self._filling: dict[str, asyncio.Task[None]] = {}
        self._broken: set[str] = set()
        self._clearing: dict[int, asyncio.Task[None]] = {}
        self._leftover: set[int] = set()
        """Slots that were given to another version, whose fill has not been called yet."""
        self._changed = asyncio.Event()
        """Set, and replaced by another, whenever something may leave that could not before."""

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

        Raises InvalidCombination when they can never fit together, AdapterRejected when one alone cannot, Overloaded
        when others hold the memory for longer than is waited, and what a fill raised. A caller that is cancelled while
        it waits takes nothing.
        """
        self.table.check_fits(refs)
        while (lease := await self._lease(refs)) is None:
            pass
        try:
            yield lease.slots
        finally:
            self._release(lease)

    async def _lease(self, refs: Mapping[str, AdapterRef]) -> Lease | None:
        """Slots that are filled; None where one was loaded for others, who asked for more than fits: ask again."""
        lease = await self._acquire(refs)
        try:
            for version in lease.slots:
                if version in self._filling:
                    await asyncio.shield(self._filling[version])
            return lease
        except _TooMuchTogether as error:
            self._release(lease)
            if error.beside <= set(refs):
                raise error.reason from None
            # That the load has ended is noted by a callback, which may still be due.
            await asyncio.sleep(0)
            while error.version in self._broken:
                await self._changed.wait()
            return None
        except BaseException:
            self._release(lease)
            raise

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
        self._wake()

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
                self._start(move, waiter.refs)
            self.counters["slot_hits"] += len(lease.slots) - len(lease.moves)
            waiter.lease.set_result(lease)
        self._waiting.extend(blocked)

    def _release(self, lease: Lease) -> None:
        self.table.release(lease)
        for version in self._broken & set(lease.slots):
            self._forget(version)
        self._admit()
        self._wake()

    def _forget(self, version: str) -> None:
        """Give up what could not be filled, once the last who waited for it has let go."""
        if self.table.discard(version) is not None:
            self._broken.discard(version)
            del self._filling[version]

    def _start(self, move: Move, refs: Mapping[str, AdapterRef]) -> None:
        # What left a slot while it was still being loaded must not go on loading there.
        obsolete = self._filling.pop(move.evicted, None) if move.evicted is not None else None
        task = asyncio.ensure_future(self._filled_after(obsolete, move.slot, refs[move.version], frozenset(refs)))
        self._filling[move.version] = task
        self._broken.discard(move.version)
        self.counters["slot_loads"] += 1
        if move.evicted is not None:
            self._leftover.add(move.slot)
            self.counters["slot_evictions"] += 1
        task.add_done_callback(lambda done: self._filled(move.version, done))

    async def _filled_after(
        self, obsolete: asyncio.Task[None] | None, slot: int, ref: AdapterRef, beside: frozenset[str]
    ) -> None:
        """``beside``: versions that are asked for together with ``ref``."""
        if obsolete is not None:
            obsolete.cancel()
            await asyncio.wait([obsolete])
        if slot in self._clearing:
            await asyncio.wait([self._clearing[slot]])
        deadline: float | None = None
        for _ in range(MAX_REFUSALS):
            self._leftover.discard(slot)
            self._wake()
            try:
                await self._fill(slot, ref)
                return
            except MemoryExceeded as error:
                deadline = deadline or asyncio.get_running_loop().time() + ROOM_PATIENCE_S
                await self._make_room(error, ref.version, beside, deadline)
        raise Overloaded(
            "Other adapters took the memory that was made free for this one; try again shortly.", retry_after_s=1
        )

    def _filled(self, version: str, task: asyncio.Task[None]) -> None:
        if self._filling.get(version) is not task:
            return  # it left its slot meanwhile
        if task.cancelled() or task.exception() is not None:
            self._broken.add(version)
            self._forget(version)
            self._admit()
        else:
            del self._filling[version]
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    async def _make_room(self, refusal: MemoryExceeded, version: str, beside: frozenset[str], deadline: float) -> None:
        """Let enough leave, least recently used first, once nobody holds it. Raises where it never is enough, or not
        before ``deadline``."""
        wanted, budget = refusal.facts["wanted"], refusal.facts["budget"]
        if wanted > budget:
            raise AdapterRejected(
                f"The adapter's saved modules take {wanted / 1e6:.1f} MB, and the engine has {budget / 1e6:.1f} MB for "
                "those of all adapters. Raise saved_bytes, or train it as LoRA.",
                wanted=wanted,
                budget=budget,
            )
        used = refusal.facts["used"]
        sizes = {other: size for slot, other, size in used if self.table.slot(other) == slot}
        staying = sum(size for other, size in sizes.items() if other in beside or self.table.is_pinned(other))
        if wanted + staying > budget:
            reason = InvalidCombination(
                f"{refusal.message} Those that are asked for together or pinned take {staying / 1e6:.1f} MB of it. "
                "Name fewer, unpin one, or raise saved_bytes.",
                **refusal.facts,
            )
            raise _TooMuchTogether(version, beside, reason)
        gone = {slot for slot, other, _ in used if other not in sizes}
        try:
            async with asyncio.timeout_at(deadline):
                while gone & (self._leftover | self._clearing.keys()):
                    await self._changed.wait()
                while (leaving := self._leaving(sizes, budget - wanted)) is None:
                    await self._changed.wait()
        except TimeoutError:
            raise Overloaded(
                f"{refusal.message} They are in use; try again shortly, or raise saved_bytes.", retry_after_s=1
            ) from refusal
        await self._evict(leaving)

    def _leaving(self, sizes: Mapping[str, int], limit: int) -> list[str] | None:
        """What must leave for the rest of ``sizes`` to be within ``limit``; None while too much of it is held."""
        excess = sum(size for version, size in sizes.items() if self.table.slot(version) is not None) - limit
        leaving = []
        for version in self.table.idle():
            if excess > 0 and sizes.get(version) and version not in self._filling:
                leaving.append(version)
                excess -= sizes[version]
        return leaving if excess <= 0 else None

    async def _evict(self, versions: Iterable[str]) -> None:
        tasks = []
        for version in versions:
            slot = self.table.discard(version)
            assert slot is not None, f"{version} is held"
            self.counters["slot_evictions"] += 1
            self.counters["memory_evictions"] += 1
            # Whoever gets the slot next waits until it is empty.
            task = self._clearing[slot] = asyncio.ensure_future(self._clear(slot))
            task.add_done_callback(partial(self._cleared, slot))
            tasks.append(task)
        self._admit()
        if tasks:
            await asyncio.wait(tasks)

    def _cleared(self, slot: int, task: asyncio.Task[None]) -> None:
        del self._clearing[slot]
        self._wake()
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("slot %d could not be emptied: %s", slot, error)
