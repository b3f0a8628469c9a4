"""Estimates, intervals and tests on units, from sums over them. Pure; distributions are scipy's.

Unit is what was randomised. A mean over anything smaller is a ratio of sums over units, and its variance is the delta
method's: with y and x of each unit and r = Σy / Σx,

    Var(r) ≈ (s_yy − 2·r·s_xy + r²·s_xx) / (n·x̄²),

which is also the cluster-robust variance of the mean (Deng et al., KDD 2018, §2). Latencies are means of logs so taken.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from scipy.special import gammaln, ndtri
from scipy.stats import norm

SRM_ALPHA = 0.001
"""Below this, shares are not what was planned; chi-square tests use the same (Fabijan et al., KDD 2019)."""
SRM_CONCENTRATION = 500.0
"""Of the prior: 500 sees 60/40 among 1,000 units nine times in ten and misses no more of small imbalances among
50,000 than the 10,000 of the authors' package, which sees none of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sums:
    """Of y (an outcome) and x (what it is measured over; 1 for a mean over units) of ``n`` units.

    ``is_binary``: every y counts successes among the unit's x.
    """

    n: int = 0
    y: float = 0.0
    x: float = 0.0
    yy: float = 0.0
    xy: float = 0.0
    xx: float = 0.0
    is_binary: bool = False

    @property
    def mean(self) -> float | None:
        """r = Σy / Σx."""
        return self.y / self.x if self.x else None

    @property
    def variance(self) -> float | None:
        """Of :attr:`mean`. A binary outcome that never varied gets the variance of one with four more trials, half of
        them successes (Agresti & Coull 1998): "always" is never certain."""
        if self.n < 2 or not self.x:
            return None
        r, n, x_mean = self.y / self.x, self.n, self.x / self.n
        # Σ(y − r·x)², whose mean is 0 by the choice of r
        residual = max(0.0, self.yy - 2 * r * self.xy + r * r * self.xx)
        variance = residual / (n - 1) / (n * x_mean * x_mean)
        if self.is_binary and (self.y <= 0 or self.y >= self.x):
            p = (self.y + 2) / (self.x + 4)
            variance = max(variance, p * (1 - p) / (self.x + 4))
        return variance


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Treatment minus control: ``n`` units of both arms together, ``se`` the standard error."""

    value: float
    se: float
    n: int


def effect_of(treatment: Sums, control: Sums) -> Effect | None:
    """None while either arm has too little to estimate a variance from."""
    variances = treatment.variance, control.variance
    if treatment.mean is None or control.mean is None or variances[0] is None or variances[1] is None:
        return None
    return Effect(
        value=treatment.mean - control.mean,
        se=math.sqrt(variances[0] + variances[1]),
        n=treatment.n + control.n,
    )


@dataclass(frozen=True, slots=True)
class Sequential:
    """Asymptotic confidence sequences: valid at all times at once, so that looking decides nothing.

    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Ann. Statist. 52(6), 2024 (arXiv 2103.06476), with their choice of ρ.
    N counts units of both arms, σ̂ = se·√N, and the two-sided interval's


        half = σ̂ · √( 2(Nρ²+1)/(N²ρ²) · ln(√(Nρ²+1)/α) )

    The one-sided bound has ln(1 + √(Nρ²+1)/(2α)) for the logarithm. ``units``: the N at which the intervals are
    narrowest, chosen before the data.
    """

    units: int

    def half_width(self, effect: Effect, alpha: float) -> float:
        """Half of the two-sided interval's width."""
        spread = self._spread(effect, _rho_squared(alpha, self.units))
        return effect.se * math.sqrt(spread[0] * (0.5 * math.log(spread[1]) - math.log(alpha)))

    def one_sided_width(self, effect: Effect, alpha: float) -> float:
        """How far below the estimate its lower bound lies (or above it its upper one)."""
        spread = self._spread(effect, _rho_squared(2 * alpha, self.units))
        return effect.se * math.sqrt(spread[0] * math.log(1 + math.sqrt(spread[1]) / (2 * alpha)))

    def p_value(self, effect: Effect, alpha: float) -> float:
        """The level at which :meth:`half_width`, with the ρ of ``alpha``, begins to leave 0 out; always valid."""
        if not effect.se:
            return 0.0 if effect.value else 1.0
        factor, growth = self._spread(effect, _rho_squared(alpha, self.units))
        z = effect.value / effect.se
        return min(1.0, math.exp(min(0.0, 0.5 * math.log(growth) - z * z / factor)))

    @staticmethod
    def _spread(effect: Effect, rho_squared: float) -> tuple[float, float]:
        """(2(Nρ²+1)/(Nρ²), Nρ²+1): se² times the first is σ̂²·2(Nρ²+1)/(N²ρ²)."""
        grown = effect.n * rho_squared
        return 2 * (grown + 1) / grown, grown + 1


@dataclass(frozen=True, slots=True)
class Fixed:
    """The normal interval and test, good for one look at a number of units that was declared before the data."""

    def half_width(self, effect: Effect, alpha: float) -> float:
        return effect.se * float(ndtri(1 - alpha / 2))

    def p_value(self, effect: Effect) -> float:
        if not effect.se:
            return 0.0 if effect.value else 1.0
        return float(2 * norm.sf(abs(effect.value) / effect.se))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjusted p-values by name (Holm, Scand. J. Statist. 6, 1979)."""
    adjusted, highest = {}, 0.0
    for rank, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[name]))
        adjusted[name] = highest
    return adjusted


def mismatch_p_value(counts: Sequence[int], weights: Sequence[float]) -> float:
    """Whether units came to the arms in the shares of ``weights``: a p-value that is valid however often one looks.

    One over the Bayes factor of a Dirichlet prior around the planned shares against exactly those (Lindon & Malek,
    NeurIPS 2022, arXiv 2011.03567); a martingale if the plan holds, so that its reciprocal stays above
    α with probability 1 - α for ever (Ville).
    """
    total = math.fsum(weights)
    shares = [weight / total for weight in weights]
    prior = [SRM_CONCENTRATION * share for share in shares]
    log_factor = float(
        gammaln(SRM_CONCENTRATION)
        - gammaln(SRM_CONCENTRATION + sum(counts))
        + sum(gammaln(a + n) - gammaln(a) for a, n in zip(prior, counts, strict=True))
    ) - math.fsum(n * math.log(share) for n, share in zip(counts, shares, strict=True))
    return math.exp(-max(0.0, log_factor))


def _rho_squared(alpha: float, units: int) -> float:
    """ρ² that makes the sequence narrowest at ``units``; of the one-sided one, with 2α for ``alpha``."""
    log_term = -2 * math.log(alpha)
    return (log_term + math.log(log_term + 1)) / units
