"""What was seen of one phase, added up by arm: what the analysis works on. Plain values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from serve.experiments.moments import Moments


@dataclass(frozen=True, slots=True, kw_only=True)
class ArmEvidence:
    """Of one arm: exposed units, requests, and power sums over units for each metric. Cold requests had to wait for an
    adapter to be loaded; their times are in no metric."""

    units: int
    requests: int
    fallbacks: int = 0
    cold_requests: int = 0
    cold_ln_first_s: float | None = None
    metrics: Mapping[str, Moments] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Evidence:
    """Of one phase, by arm. ``excluded``: requests that count for nothing, by kind. ``switched_units`` were seen in
    more than one arm, which should be none."""

    arms: Mapping[str, ArmEvidence]
    excluded: Mapping[str, int] = field(default_factory=dict)
    switched_units: int = 0
