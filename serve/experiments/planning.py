"""How many units an experiment needs to see an effect, and how many days that takes with the users who come now.

With the variance v of a unit (:attr:`~serve.experiments.results.MetricResult.variance`), shares s of the arms, the
boundary c of the test in standard errors and the power 1 - β, an effect is detected once the experiment has N units,
all arms together:

    N = (c + z_β)² · v · (1/s_arm + 1/s_control) / effect²

c is z_{α/2} of a fixed analysis. Of a sequential one it is the boundary at the number of units for which the sequence
is narrowest; since every look before N may decide too, that N is what it takes at most.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime

from scipy.special import ndtri

from lora_runtime.errors import Conflict, InvalidRequest
from serve.experiments.analysis import LOGARITHMIC
from serve.experiments.results import Results
from serve.experiments.statistics import Effect, Sequential

DAY_S = 86_400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Needed:
    """What an analysis needs. ``units``: of all arms together. ``days``: from now on, at the pace of this phase; None
    without traffic. ``analysis_units``: the ``units`` to declare in the plan's ``analysis``."""

    units: int
    days: float | None
    analysis_units: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """``effect``: absolute, or of times relative, as in results. ``units`` and ``units_per_day`` are those of this
    phase until now, and ``variance`` that of a unit of control."""

    metric: str
    effect: float
    power: float
    alpha: float
    mean: float
    variance: float
    units: int
    units_per_day: float
    sequential: Needed
    fixed: Needed


def forecast(
    results: Results, opened_at: datetime, *, metric: str, effect: float, is_relative: bool, power: float
) -> Forecast:
    """``effect``: the smallest one that matters; ``is_relative``: as a share of control's mean, which of times it
    always is. Raises InvalidRequest for an effect that is none and a metric that there is not, Conflict where control
    has too little data to estimate its variance, or is the only arm.
    """
    control = next(arm for arm in results.arms if arm.arm == results.control)
    if len(results.arms) < 2:
        raise Conflict("Only control answers users; there is no arm to tell from it.")
    if metric not in control.metrics:
        raise InvalidRequest(
            f"There is no metric '{metric[:64]}'; there are {', '.join(control.metrics)}.", param="metric"
        )
    found = control.metrics[metric]
    if found.mean is None or not found.variance:
        raise Conflict(
            f"Control has {found.units} units with data in {metric}, and no variance to plan with. Let the experiment "
            "collect for a while first.",
            units=found.units,
        )
    absolute = effect
    if metric in LOGARITHMIC:
        absolute = math.log1p(effect) if effect > -1 else math.nan
    elif is_relative:
        effect = absolute = effect * abs(found.mean)
    if not absolute or not math.isfinite(absolute):
        raise InvalidRequest(
            "'effect' must be the smallest change that matters: not 0, and above -100 %.", param="effect"
        )
    alpha = results.alpha / (len(results.arms) - 1)
    shares = {arm.arm: arm.planned_share for arm in results.arms}
    least = min(share for name, share in shares.items() if name != results.control)
    spread = found.variance * (1 / least + 1 / shares[results.control]) / absolute**2
    seconds = max(1.0, (results.as_of - opened_at).total_seconds())
    per_day = results.units / seconds * DAY_S
    pair = least + shares[results.control]

    def needed(boundary: float, observations: float) -> Needed:
        units = math.ceil((boundary + float(ndtri(power))) ** 2 * spread)
        days = max(0, units - results.units) / per_day if per_day else None
        return Needed(units=units, days=days, analysis_units=max(10, math.ceil(units * pair * observations)))

    return Forecast(
        metric=metric,
        effect=effect,
        power=power,
        alpha=results.alpha,
        mean=found.mean,
        variance=found.variance,
        units=results.units,
        units_per_day=per_day,
        sequential=needed(narrowest_boundary(alpha), max(1.0, found.observations / found.units)),
        fixed=needed(-float(ndtri(alpha / 2)), 1.0),
    )


def narrowest_boundary(alpha: float) -> float:
    """Half of a sequence's interval where it is narrowest, in standard errors: the same whatever its ``units``."""
    units = 1000
    effect = Effect(value=0.0, se=1.0, control=0.0, variances=(0.5, 0.5), units=(500, 500), observations=units)
    return Sequential(units).half_width(effect, alpha)
