"""What events do to sums: the effects of a batch of them, as they wait to be added up, and a unit's own sums.

A unit's sums in an arm are, by quantity, its y (in units of 2⁻⁸⁰) and its x, and of feedback also the largest value
that was reported. From them follow the y and x that a metric has of the unit, by the metric's way of measuring.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

from serve.experiments.assignment import Kind
from serve.experiments.definition import ERROR_RATE, FIRST_TOKEN, TOKEN_TIME, Metric
from serve.experiments.power_sums import ONE, fixed

FAULT = 500
"""Statuses from here on are the service's fault; those below are the caller's, or load that all arms share."""
REQUESTS = "#requests"
COLD = "#cold"
"""Quantities beside the metrics: requests of a unit, and log times of answers that waited for an adapter. No metric's
name begins so."""

UnitSums = dict[str, list[int]]
"""By quantity: [Y, x], and of feedback [Y, x, largest Y]."""
Asked = tuple[str | None, str, bool]
"""Arm, assignment, and whether it counts: what requests are counted by."""


class Way(NamedTuple):
    """How a metric takes a unit's feedback. ``kind``: mean of reports, sum over requests, whether any was true, or sum.
    ``floor`` and ``cap``: what the unit's mean counts as at least and at most, in units of 2⁻⁸⁰."""

    kind: Literal["feedback", "request", "any", "sum"]
    floor: int | None = None
    cap: int | None = None

    def limited(self, y: int, x: int) -> int:
        """Y of a unit whose mean is within the limits."""
        y = y if self.cap is None else min(y, self.cap * x)
        return y if self.floor is None else max(y, self.floor * x)


PLAIN = Way("feedback")


class Asking(Protocol):
    """A request, as far as its effect depends on it."""

    @property
    def arm(self) -> str | None: ...

    @property
    def unit(self) -> str | None: ...

    @property
    def assignment(self) -> str: ...

    @property
    def counts(self) -> bool: ...


class Ended(NamedTuple):
    """How a request ended: an outcome's part that is evidence. Times are logarithms of seconds."""

    status: int
    is_cold: bool
    ln_first_s: float | None
    ln_token_s: float | None


def way_of(metric: Metric) -> Way:
    floor, cap = (None if limit is None else fixed(limit) for limit in (metric.floor, metric.cap))
    if metric.level != "unit":
        return Way(metric.level, floor, cap)
    return Way("any" if metric.kind == "bool" else "sum", floor, cap)


@dataclass(slots=True)
class Effects:
    """Of events of one phase, each of which is new: units exposed by arm, requests, and what units' sums grow by."""

    exposed: Counter[str] = field(default_factory=Counter)
    asked: Counter[Asked] = field(default_factory=Counter)
    units: dict[tuple[str, str], UnitSums] = field(default_factory=lambda: defaultdict(dict))
    ways: dict[str, Way] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """About how much work it is to add them up."""
        return len(self.exposed) + len(self.asked) + len(self.units)

    def exposure(self, arm: str) -> None:
        self.exposed[arm] += 1

    def trial(self, trial: Asking) -> None:
        self.asked[trial.arm, str(trial.assignment), trial.counts] += 1
        if (place := _evident(trial)) is not None:
            grown = self.units[place]
            if trial.assignment == Kind.HASH:
                grow(grown, REQUESTS, 0)

    def outcome(self, trial: Asking, ended: Ended) -> None:
        """Faults of all that an arm should have answered; times of what it did answer, warm, and apart of what it
        answered cold."""
        if (place := _evident(trial)) is None:
            return
        grown = self.units[place]
        is_fault = ended.status >= FAULT or trial.assignment == Kind.FALLBACK
        grow(grown, ERROR_RATE, ONE if is_fault else 0)
        if ended.status >= 400 or trial.assignment != Kind.HASH:
            return
        if ended.ln_first_s is not None:
            grow(grown, COLD if ended.is_cold else FIRST_TOKEN, fixed(ended.ln_first_s))
        if ended.ln_token_s is not None and not ended.is_cold:
            grow(grown, TOKEN_TIME, fixed(ended.ln_token_s))

    def feedback(self, trial: Asking, metric: str, way: Way, value: float) -> None:
        if trial.assignment == Kind.HASH and (place := _evident(trial)) is not None:
            self.ways[metric] = way
            y = fixed(value)
            merge_sums(self.units[place], {metric: [y, 1, y]})

    def merge(self, other: Effects) -> None:
        self.exposed.update(other.exposed)
        self.asked.update(other.asked)
        self.ways.update(other.ways)
        for place, grown in other.units.items():
            merge_sums(self.units[place], grown)

    def to_json(self) -> dict[str, Any]:
        return {
            "exposed": dict(self.exposed),
            "asked": [[*asked, number] for asked, number in self.asked.items()],
            "units": [[arm, unit, grown] for (arm, unit), grown in self.units.items()],
            "ways": self.ways,
        }

    @classmethod
    def of_json(cls, found: Mapping[str, Any]) -> Effects:
        effects = cls(
            exposed=Counter(found["exposed"]),
            asked=Counter({(arm, kind, counts): number for arm, kind, counts, number in found["asked"]}),
            ways={metric: Way(*way) for metric, way in found["ways"].items()},
        )
        effects.units.update({(arm, unit): grown for arm, unit, grown in found["units"]})
        return effects


def grow(sums: UnitSums, quantity: str, y: int) -> None:
    """Add one observation that was measured."""
    if (found := sums.get(quantity)) is None:
        sums[quantity] = [y, 1]
    else:
        found[0] += y
        found[1] += 1


def merge_sums(sums: UnitSums, grown: UnitSums) -> None:
    """Add what ``grown`` has to ``sums``; lists of neither are changed or shared."""
    for quantity, new in grown.items():
        if (old := sums.get(quantity)) is None:
            sums[quantity] = new.copy()
        elif len(new) == 2:
            sums[quantity] = [old[0] + new[0], old[1] + new[1]]
        else:
            sums[quantity] = [old[0] + new[0], old[1] + new[1], max(old[2], new[2])]


def measures(sums: UnitSums, ways: Mapping[str, Way]) -> Iterator[tuple[str, int, int]]:
    """The quantity, Y and x of everything that is measured of a unit."""
    for quantity, found in sums.items():
        way = ways.get(quantity, PLAIN)
        y, x = found[0], found[1]
        if way.kind == "request":
            x = sums[REQUESTS][1] if REQUESTS in sums else 0
        elif way.kind != "feedback":
            y, x = found[2] if way.kind == "any" else y, 1
        yield quantity, way.limited(y, x), x


def _evident(trial: Asking) -> tuple[str, str] | None:
    """Arm and unit of a request that is evidence."""
    if not trial.counts or (arm := trial.arm) is None or (unit := trial.unit) is None:
        return None
    return arm, unit
