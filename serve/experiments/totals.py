"""What a phase adds up to, kept up as effects come: counts, and power sums over units by arm and quantity."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.experiments.assignment import Kind
from serve.experiments.definition import ERROR_RATE, MEASURED, Metric, Plan
from serve.experiments.effects import COLD, REQUESTS, Asked, Effects, UnitSums, Way, measures, merge_sums
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments
from serve.experiments.power_sums import PowerSums, of_units

Place = tuple[str, str]
"""An arm and a unit."""


@dataclass(slots=True)
class Totals:
    """Of one phase. ``switched`` units were seen in more than one arm; ``ways`` of metrics that feedback came of."""

    exposed: Counter[str] = field(default_factory=Counter)
    asked: Counter[Asked] = field(default_factory=Counter)
    switched: int = 0
    ways: dict[str, Way] = field(default_factory=dict)
    sums: dict[Place, PowerSums] = field(default_factory=lambda: defaultdict(PowerSums))
    """By arm and quantity."""

    def fold(self, effects: Effects, before: Mapping[Place, UnitSums], arms_of: Counter[str]) -> dict[Place, UnitSums]:
        """Take in ``effects``; returns what their units' sums are then. ``before``: those sums until now, where there
        are any; ``arms_of``: in how many arms each unit was seen until now."""
        self.exposed.update(effects.exposed)
        self.asked.update(effects.asked)
        self.ways.update(effects.ways)
        after = {}
        for (arm, unit), grown in effects.units.items():
            old = before.get((arm, unit))
            new = {} if old is None else dict(old)
            merge_sums(new, grown)
            self.replace(arm, old or {}, new)
            after[arm, unit] = new
            if old is None:
                arms_of[unit] += 1
                self.switched += arms_of[unit] == 2
        return after

    def replace(self, arm: str, old: UnitSums, new: UnitSums) -> None:
        """A unit's sums in ``arm`` are ``new`` from now on."""
        was = {quantity: (y, x) for quantity, y, x in measures(old, self.ways)}
        for quantity, y, x in measures(new, self.ways):
            if (found := was.get(quantity)) != (y, x):
                sums = self.sums[arm, quantity]
                if found is not None:
                    sums.add(*found, -1)
                sums.add(y, x)

    def evidence(self, plan: Plan) -> Evidence:
        """What the analysis needs."""
        requests, fallbacks, excluded = Counter[str](), Counter[str](), Counter[str]()
        for (arm, kind, counts), number in self.asked.items():
            if counts and kind == Kind.HASH:
                requests[str(arm)] += number
                continue
            if counts and kind == Kind.FALLBACK:
                fallbacks[str(arm)] += number
            excluded[kind if kind != Kind.HASH else "after_decision"] += number
        arms = {}
        for arm in sorted({*self.exposed, *requests, *fallbacks, *(arm for arm, _ in self.sums)}):
            cold = self._of(arm, COLD).moments()
            measured = {name: self._of(arm, name).moments(is_binary=name == ERROR_RATE) for name in sorted(MEASURED)}
            arms[arm] = ArmEvidence(
                units=self.exposed[arm],
                requests=requests[arm],
                fallbacks=fallbacks[arm],
                cold_requests=round(cold.x),
                cold_ln_first_s=cold.mean,
                metrics=measured | {metric.name: self._reported(arm, metric) for metric in plan.metrics},
            )
        return Evidence(arms=arms, excluded=dict(excluded), switched_units=self.switched)

    def _reported(self, arm: str, metric: Metric) -> Moments:
        found = self._of(arm, metric.name)
        if metric.level == "request":
            found = found.with_silent(self._of(arm, REQUESTS))
        elif metric.level == "unit":
            # More than are exposed only where exposures were lost with a gateway.
            found = found.with_silent(of_units(max(self.exposed[arm], found.n)))
        return found.moments(is_binary=metric.kind == "bool")

    def _of(self, arm: str, quantity: str) -> PowerSums:
        return self.sums.get((arm, quantity)) or PowerSums()
