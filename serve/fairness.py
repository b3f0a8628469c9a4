"""Whose turn it is at an engine, so that one busy adapter cannot starve the others."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count

from lora_runtime.errors import Overloaded

RETRY_S = 1.0


@dataclass(slots=True, eq=False)
class _Waiter:
    tenant: str
    cost: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairQueue:
    """At most ``width`` requests are inside; up to ``max_waiting`` more wait, each tenant's in order of arrival.

    The next turn is the waiting tenant's that has the fewest inside, and of equals the one's whose last turn is
    longest ago (max-min fairness). When all places to wait are taken, a newcomer takes that of the last arrival of
    whoever has most waiting, if that is more than its own (longest queue drop: Suter et al., INFOCOM 1998).
    Spare requests are inside while more than half of all places are free, and are given up when anybody else has to
    wait. Used from one event loop.
    """

    def __init__(self, width: int, max_waiting: int) -> None:
        self._width = width
        self._max_waiting = max_waiting
        self._inside: Counter[str] = Counter()
        self._waiting: dict[str, deque[_Waiter]] = {}
        self._last_turn: dict[str, int] = {}
        self._turns = count(1)
        self._spare: dict[asyncio.Event, int] = {}

    @property
    def num_waiting(self) -> int:
        return sum(len(queue) for queue in self._waiting.values())

    @property
    def num_inside(self) -> int:
        return self._inside.total() + sum(self._spare.values())

    @asynccontextmanager
    async def turn(self, tenant: str, cost: int = 1) -> AsyncIterator[None]:
        """Be inside for the context, taking ``cost`` places. Raises Overloaded when there is no place to wait."""
        waiter = _Waiter(tenant, cost)
        self._join(waiter)
        self._grant()
        if not waiter.granted.done():
            self._give_up_spare()
        try:
            await waiter.granted
        except BaseException:
            self._abandon(waiter)
            raise
        try:
            yield
        finally:
            self._leave(waiter)

    @contextmanager
    def spare(self, cost: int = 1) -> Iterator[asyncio.Event]:
        """Be inside for as long as nobody else needs the places: the event is set when it is time to leave.

        Raises Overloaded, and never waits, where half of all places would be taken."""
        if self._waiting or 2 * (self.num_inside + cost) > self._width:
            raise Overloaded("There is no room to spare.", retry_after_s=RETRY_S)
        given_up = asyncio.Event()
        self._spare[given_up] = cost
        try:
            yield given_up
        finally:
            del self._spare[given_up]
            self._grant()

    def _give_up_spare(self) -> None:
        for given_up in self._spare:
            given_up.set()

    def _join(self, waiter: _Waiter) -> None:
        mine = self._waiting.get(waiter.tenant, ())
        if self.num_waiting >= self._max_waiting and (self._waiting or not self._fits(waiter.cost)):
            longest = max(self._waiting.values(), key=len, default=None)
            if longest is None or len(longest) <= len(mine) + 1:
                raise _overloaded()
            last = longest[-1]
            self._remove(last)
            if not last.granted.done():
                last.granted.set_exception(_overloaded())
        self._waiting.setdefault(waiter.tenant, deque()).append(waiter)

    def _grant(self) -> None:
        while self._waiting:
            tenant = min(self._waiting, key=lambda name: (self._inside[name], self._last_turn.get(name, 0)))
            waiter = self._waiting[tenant][0]
            if not self._fits(waiter.cost):
                return
            self._remove(waiter)
            if waiter.granted.done():  # cancelled, and not yet told so
                continue
            self._inside[tenant] += waiter.cost
            self._last_turn[tenant] = next(self._turns)
            waiter.granted.set_result(None)

    def _fits(self, cost: int) -> bool:
        """What is wider than all places waits until it is alone."""
        return self.num_inside + cost <= self._width or not self.num_inside

    def _abandon(self, waiter: _Waiter) -> None:
        if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self._leave(waiter)
        else:
            with suppress(ValueError, KeyError):  # its place was taken already
                self._remove(waiter)
            self._grant()

    def _leave(self, waiter: _Waiter) -> None:
        self._inside[waiter.tenant] -= waiter.cost
        self._forget(waiter.tenant)
        self._grant()

    def _remove(self, waiter: _Waiter) -> None:
        queue = self._waiting[waiter.tenant]
        queue.remove(waiter)
        if not queue:
            del self._waiting[waiter.tenant]

    def _forget(self, tenant: str) -> None:
        """Nothing is kept of tenants who are gone, but for when their last turn was while others wait."""
        if not self._inside[tenant]:
            del self._inside[tenant]
        if not self._waiting and not self._inside:
            self._last_turn.clear()


def _overloaded() -> Overloaded:
    return Overloaded("The engine's queue is full; try again shortly.", retry_after_s=RETRY_S)
