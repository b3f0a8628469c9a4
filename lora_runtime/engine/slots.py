"""Who lives in which slot: least recently used leaves first, nothing leaves while it is held.

Pure bookkeeping; the caller moves the tensors. One thread (the engine's step loop) changes it; other
threads may look (``resident``, ``num_held``, ``check_fits``), and see it as it was a moment ago.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from lora_runtime.errors import InvalidCombination


@dataclass(frozen=True, slots=True)
class Move:
    """``version`` must be put into ``slot``, replacing ``evicted`` (None: the slot was free)."""

    version: str
    slot: int
    evicted: str | None


@dataclass(frozen=True, slots=True)
class Lease:
    """Slots held for one request: version → slot. Give it back with :meth:`SlotTable.release`, once."""

    slots: Mapping[str, int]
    moves: tuple[Move, ...]


@dataclass(slots=True)
class _Resident:
    slot: int
    holds: int = 0
    pinned: bool = False


class SlotTable:
    """Residency of versions in a fixed number of slots."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._residents: OrderedDict[str, _Resident] = OrderedDict()
        self._free = list(range(capacity - 1, -1, -1))

    @property
    def resident(self) -> tuple[str, ...]:
        """Versions in slots, least recently used first."""
        return tuple(self._residents)

    @property
    def num_held(self) -> int:
        """Slots under at least one lease."""
        return sum(1 for resident in tuple(self._residents.values()) if resident.holds)

    def check_fits(self, versions: Iterable[str]) -> None:
        """Raise InvalidCombination when no state of the table could ever hold ``versions`` together."""
        wanted = set(versions)
        pinned = {v for v, resident in tuple(self._residents.items()) if resident.pinned}
        if len(wanted | pinned) > self._capacity:
            raise InvalidCombination(
                f"The request names {len(wanted)} adapters, but an engine holds at most "
                f"{self._capacity - len(pinned - wanted)} for one request. Name fewer, merge some, or raise max_slots.",
                wanted=len(wanted),
                max_slots=self._capacity,
            )

    def holds_all(self, versions: Iterable[str]) -> bool:
        """Whether all of ``versions`` are resident."""
        return all(version in self._residents for version in versions)

    def can_acquire(self, versions: Iterable[str]) -> bool:
        """Whether :meth:`acquire` would succeed now."""
        wanted = frozenset(versions)
        return self._victims(len(wanted - set(self._residents)) - len(self._free), wanted) is not None

    def acquire(self, versions: Iterable[str]) -> Lease | None:
        """Hold slots for all of ``versions``, or for none (None: too many are held by others)."""
        wanted = sorted(set(versions))
        missing = [version for version in wanted if version not in self._residents]
        victims = self._victims(len(missing) - len(self._free), frozenset(wanted))
        if victims is None:
            return None
        moves = []
        for version in missing:
            evicted = None if self._free else victims.pop(0)
            slot = self._free.pop() if evicted is None else self._residents.pop(evicted).slot
            self._residents[version] = _Resident(slot)
            moves.append(Move(version, slot, evicted))
        for version in wanted:
            self._residents[version].holds += 1
            self._residents.move_to_end(version)
        return Lease({version: self._residents[version].slot for version in wanted}, tuple(moves))

    def release(self, lease: Lease) -> None:
        """End a lease; its versions stay resident until their slots are needed."""
        for version in lease.slots:
            resident = self._residents[version]
            if resident.holds == 0:
                raise RuntimeError(f"slot {resident.slot} was released more often than it was acquired")
            resident.holds -= 1

    def abandon(self, lease: Lease) -> None:
        """End a lease whose moves could not be carried out: what it brought in is forgotten again."""
        self.release(lease)
        for move in lease.moves:
            self.discard(move.version)

    def discard(self, version: str) -> int | None:
        """Forget a version that is not held and return its slot; None where it is held or absent."""
        resident = self._residents.get(version)
        if resident is None or resident.holds:
            return None
        del self._residents[version]
        self._free.append(resident.slot)
        return resident.slot

    def slot(self, version: str) -> int | None:
        """Where a version lives; None if it is not resident."""
        resident = self._residents.get(version)
        return None if resident is None else resident.slot

    def is_pinned(self, version: str) -> bool:
        return version in self._residents and self._residents[version].pinned

    def idle(self) -> tuple[str, ...]:
        """Versions that may leave, least recently used first."""
        return tuple(v for v, resident in self._residents.items() if not resident.holds and not resident.pinned)

    def pin(self, version: str) -> None:
        """Keep a resident version from eviction. Raises KeyError if it is not resident."""
        self._residents[version].pinned = True

    def unpin(self, version: str) -> None:
        """Let a version be evicted again; nothing happens where it is not resident."""
        if version in self._residents:
            self._residents[version].pinned = False

    def _victims(self, count: int, wanted: frozenset[str]) -> list[str] | None:
        """The ``count`` versions to evict, oldest first; None when that many may not leave."""
        idle = [version for version in self.idle() if version not in wanted]
        return None if len(idle) < count else idle[: max(count, 0)]
