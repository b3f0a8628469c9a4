"""Which engine replica a request goes to first: one that holds its adapters, unless others have so much less to do.

A decision over plain values; ``routing.py`` asks for it. Every replica can serve every request: this is a hint.
"""

from __future__ import annotations

import hashlib
from collections.abc import Set
from dataclasses import dataclass

LOAD_COST = 4.0
"""An adapter that has to be loaded is worth waiting behind this many requests for a replica that has it."""
STRANGER_COST = 2.0
"""And this many more where the adapter has never been: its files may lie in no cache there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A replica as a router knows it: the versions in its slots, and how many requests it has."""

    id: str
    held: Set[str]
    load: int


def ranked(wanted: Set[str], candidates: list[Candidate], load_cost: float = LOAD_COST) -> list[Candidate]:
    """``candidates``, cheapest first, for a request that needs the versions ``wanted`` at once.

    The cost of a replica is what it has to do: its requests, and the loading of what it lacks. So a hot adapter's
    requests spill to a second replica once the first has ``load_cost`` requests more, and that one holds it from then
    on. A set that nobody holds goes where rendezvous hashing says (Thaler and Ravishankar 1998), so that all routers
    agree without asking each other, and few sets move when replicas come and go.
    """
    affinities = {candidate.id: _affinity(wanted, candidate.id) for candidate in candidates}
    home = max(affinities.values(), default=0)

    def cost(candidate: Candidate) -> tuple[float, int]:
        missing = len(wanted - candidate.held)
        affinity = affinities[candidate.id]
        each = load_cost + (0.0 if affinity == home else STRANGER_COST)
        return candidate.load + missing * each, -affinity

    return sorted(candidates, key=cost)


def _affinity(wanted: Set[str], replica: str) -> int:
    """A number that this set has for this replica alone. Without adapters, none is anyone's home."""
    if not wanted:
        return 0
    text = "\n".join([*sorted(wanted), replica])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest())
