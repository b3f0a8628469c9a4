"""Whose request an engine takes next: fair between callers, and between the adapters of each.

Two levels of max-min fairness, as in hierarchical fair queueing (Bennett & Zhang, SIGCOMM 1996). Callers share the
places; the requests of one caller are shared out between adapters, so that one busy adapter cannot starve the others
where nobody tells who asks. A combination of adapters waits in the queue of the busiest of its members: whoever
spreads requests over combinations of k adapters has k queues at most, and nobody gets away from a busy adapter's queue
by adding another adapter to it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field

from lora_runtime.errors import Overloaded

RETRY_S = 1.0
BASE = ""
"""Stands for an adapter in requests without one."""


@dataclass(slots=True)
class _Share:
    """What one of those who share has. ``last_turn``: the number of its last turn or, before the first, of the turn
    that was the last when it came: so a stream of newcomers can't keep anybody waiting for ever."""

    last_turn: int
    has_had_turn: bool = False
    inside: int = 0
    num_waiting: int = 0

    @property
    def order(self) -> tuple[int, int, bool]:
        """Who has least of it is next."""
        return self.inside, self.last_turn, self.has_had_turn

    @property
    def is_idle(self) -> bool:
        return not self.inside and not self.num_waiting

    def enter(self, cost: int, turn: int) -> None:
        self.inside += cost
        self.last_turn, self.has_had_turn = turn, True


@dataclass(slots=True)
class _Adapter(_Share):
    """One adapter's requests of one caller, in order of arrival."""

    queue: deque[_Waiter] = field(default_factory=deque)


@dataclass(slots=True)
class _Caller(_Share):
    """One caller's requests by adapter: only adapters that have some, waiting or inside."""

    adapters: dict[str, _Adapter] = field(default_factory=dict)


@dataclass(slots=True, eq=False)
class _Waiter:
    caller: str
    adapter: str
    cost: int
    granted: asyncio.Future[None] = field(default_factory=lambda: asyncio.get_running_loop().create_future())


class FairQueue:
    """At most ``width`` requests are inside; up to ``max_waiting`` more wait.

    The next turn is the waiting caller's that has the fewest inside, and of equals the one's whose last turn is
    longest ago; it goes to that caller's adapter that is next by the same rule, and there in order of arrival. When
    all places to wait are taken, a newcomer takes that of the last arrival in the longest queue (longest queue drop:
    Suter et al., INFOCOM 1998): of the caller who has most waiting, if that is more than the newcomer's own;
    otherwise of its own caller's adapter that has most waiting, if that is more than its own. Spare requests are
    inside while more than half of all places are free, and are given up when anybody else has to wait.

    A turn costs time linear in the callers and adapters that wait. Used from one event loop.
    """

    def __init__(self, width: int, max_waiting: int) -> None:
        self._width = width
        self._max_waiting = max_waiting
        self._callers: dict[str, _Caller] = {}
        self._num_waiting = 0
        self._num_inside = 0
        self._num_turns = 0
        self._spare: dict[asyncio.Event, int] = {}

    @property
    def num_waiting(self) -> int:
        return self._num_waiting

    @property
    def num_inside(self) -> int:
        return self._num_inside + sum(self._spare.values())

    @asynccontextmanager
    async def turn(self, caller: str, adapters: Collection[str] = (), cost: int = 1) -> AsyncIterator[None]:
        """Be inside for the context, taking ``cost`` places. Raises Overloaded when there is no place to wait."""
        waiter = _Waiter(caller, self._busiest(caller, adapters), cost)
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
        if self._num_waiting or 2 * (self.num_inside + cost) > self._width:
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

    def _busiest(self, caller: str, adapters: Collection[str]) -> str:
        """In whose queue a request for ``adapters`` waits."""
        known = self._callers[caller].adapters if caller in self._callers else {}

        def busy(name: str) -> int:
            return known[name].inside + known[name].num_waiting if name in known else 0

        return max(sorted(adapters), key=busy, default=BASE)

    def _join(self, waiter: _Waiter) -> None:
        if self._num_waiting >= self._max_waiting and (self._num_waiting or not self._fits(waiter.cost)):
            last = self._last_of_longest(waiter)
            if last is None:
                raise _overloaded()
            self._withdraw(last)
            if not last.granted.done():
                last.granted.set_exception(_overloaded())
        caller = self._callers.setdefault(waiter.caller, _Caller(self._num_turns))
        adapter = caller.adapters.setdefault(waiter.adapter, _Adapter(self._num_turns))
        adapter.queue.append(waiter)
        self._count_waiting(caller, adapter, 1)

    def _last_of_longest(self, newcomer: _Waiter) -> _Waiter | None:
        """The waiter that the newcomer replaces; None where no queue is longer than its own would be."""
        own = self._callers.get(newcomer.caller, _Caller(0))
        longest = max(self._callers.values(), key=_waiting, default=own)
        if longest.num_waiting > own.num_waiting + 1:
            return max(longest.adapters.values(), key=_waiting).queue[-1]
        mine = own.adapters.get(newcomer.adapter, _Adapter(0))
        most = max(own.adapters.values(), key=_waiting, default=mine)
        return most.queue[-1] if most.num_waiting > mine.num_waiting + 1 else None

    def _grant(self) -> None:
        while self._num_waiting and self._fits(1):
            caller = min((c for c in self._callers.values() if c.num_waiting), key=_order)
            adapter = min((a for a in caller.adapters.values() if a.num_waiting), key=_order)
            waiter = adapter.queue[0]
            if waiter.granted.done():  # cancelled, and not yet told so
                self._withdraw(waiter)
                continue
            if not self._fits(waiter.cost):
                return
            adapter.queue.popleft()
            self._count_waiting(caller, adapter, -1)
            self._num_turns += 1
            self._num_inside += waiter.cost
            caller.enter(waiter.cost, self._num_turns)
            adapter.enter(waiter.cost, self._num_turns)
            waiter.granted.set_result(None)

    def _fits(self, cost: int) -> bool:
        """What is wider than all places waits until it is alone."""
        return self.num_inside + cost <= self._width or not self.num_inside

    def _abandon(self, waiter: _Waiter) -> None:
        if waiter.granted.done() and not waiter.granted.cancelled() and waiter.granted.exception() is None:
            self._leave(waiter)
        else:
            self._withdraw(waiter)
            self._grant()

    def _leave(self, waiter: _Waiter) -> None:
        caller = self._callers[waiter.caller]
        for share in (caller, caller.adapters[waiter.adapter]):
            share.inside -= waiter.cost
        self._num_inside -= waiter.cost
        self._forget_idle(waiter)
        self._grant()

    def _withdraw(self, waiter: _Waiter) -> None:
        """Take ``waiter`` out of its queue, where it still is in it."""
        caller = self._callers.get(waiter.caller)
        adapter = caller.adapters.get(waiter.adapter) if caller is not None else None
        if caller is None or adapter is None or waiter not in adapter.queue:
            return
        adapter.queue.remove(waiter)
        self._count_waiting(caller, adapter, -1)
        self._forget_idle(waiter)

    def _count_waiting(self, caller: _Caller, adapter: _Adapter, change: int) -> None:
        caller.num_waiting += change
        adapter.num_waiting += change
        self._num_waiting += change

    def _forget_idle(self, waiter: _Waiter) -> None:
        """Nothing is kept of callers and adapters that have nothing here."""
        caller = self._callers[waiter.caller]
        if caller.adapters[waiter.adapter].is_idle:
            del caller.adapters[waiter.adapter]
        if caller.is_idle:
            del self._callers[waiter.caller]


def _order(share: _Share) -> tuple[int, int, bool]:
    return share.order


def _waiting(share: _Share) -> int:
    return share.num_waiting


def _overloaded() -> Overloaded:
    return Overloaded("The engine's queue is full; try again shortly.", retry_after_s=RETRY_S)
