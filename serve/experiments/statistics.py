"""Estimates, intervals and tests on units, from power sums over them. Pure; distributions are scipy's.

Unit is what was randomised. A mean over anything smaller is a ratio of sums over units, r = Σy / Σx, and its variance
is the delta method's, which is also the cluster-robust one (Deng et al., KDD 2018, §2): with d = y − r·x,

    v = Σd² / ((n − 1)·n·x̄²).

Latencies are means of logs so taken.

The standard error of a difference is the larger of two. One adds the arms' own variances. The other pools them as the
null hypothesis has it, with residuals around the ratio R of both arms together:

    v₀ = (1/n₁ + 1/n₀) / (n₁ + n₀ − 2) · Σ_arms Σ (y − R·x)² / x̄²

Both estimate the same where the hypothesis holds. The first alone errs where values are skewed and one arm is small: an
arm that has drawn few of the rare large values has a low mean and a low variance, both by the same luck, and looks
certain. It errs too where a few heavy users carry a ratio, which then follows them and leaves no residual. With the
larger of both, at any of a hundred looks, false positives stay below 5 % for all of these (see
``tests/unit/serve/experiments/test_false_positives.py``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scipy.special import gammaln
from scipy.stats import t as student

from serve.experiments.moments import NOISE, Moments

SRM_ALPHA = 0.001
"""Below this, shares are not what was planned; chi-square tests use the same (Fabijan et al., KDD 2019)."""
SRM_CONCENTRATION = 500.0
"""Of the prior: 500 sees 60/40 among 1,000 units nine times in ten and misses no more of small imbalances among
50,000 than the 10,000 of the authors' package, which sees none of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """Treatment minus control.

    ``se``: its standard error. ``variances``: of the means of treatment and control, each by itself. ``units``: of
    each. ``observations``: what was seen of both arms together, at least one for each unit: the clock of sequential
    tests.
    """

    value: float
    se: float
    control: float
    variances: tuple[float, float]
    units: tuple[int, int]
    observations: float

    @property
    def degrees(self) -> float:
        """Of freedom, by Welch and Satterthwaite."""
        of_each = (v * v / (n - 1) for v, n in zip(self.variances, self.units, strict=True))
        return sum(self.variances) ** 2 / total if (total := math.fsum(of_each)) else sum(self.units) - 2.0

    def relative(self, width: float) -> tuple[float, float, float] | None:
        """The relative effect and its interval, by Fieller's theorem (Suppl. J. R. Statist. Soc. 7(1), 1940).

        ``width``: half of the interval of :attr:`value`; both intervals leave 0 out together. None where the control's
        mean is not clearly away from 0.
        """
        if not self.se or not self.control:
            return None
        multiple = width**2 / (math.fsum(self.variances) or self.se**2)
        treatment = self.control + self.value
        a = self.control**2 - multiple * self.variances[1]
        root = self.control**2 * treatment**2 - a * (treatment**2 - multiple * self.variances[0])
        if a <= 0 or root < 0:
            return None
        middle, half = self.control * treatment / a, math.sqrt(root) / a
        return self.value / self.control, middle - half - 1, middle + half - 1


def variance_of(moments: Moments) -> float | None:
    """Of the mean; None below two units.

    A binary outcome that never varied gets the variance of one with four more trials, half of them successes (Agresti &
    Coull 1998): "always" is never certain.
    """
    if moments.n < 2 or not moments.x:
        return None
    variance = unit_variance(moments) / moments.n
    if moments.is_binary and (moments.y <= 0 or moments.y >= moments.x):
        p = (moments.y + 2) / (moments.x + 4)
        variance = max(variance, p * (1 - p) / (moments.x + 4))
    return variance


def unit_variance(moments: Moments) -> float:
    """Of one unit's d / x̄; over n it is the variance of the mean."""
    return moments.residuals.square / (moments.n - 1) / (moments.x / moments.n) ** 2


def kurtosis(moments: Moments) -> float | None:
    """n·Σd⁴ / (Σd²)²; None without spread."""
    square, _, fourth = moments.residuals
    return moments.n * fourth / square**2 if square else None


def effect_of(treatment: Moments, control: Moments, observations: float = 0.0) -> Effect | None:
    """None while either arm has too little to estimate a variance from.

    ``observations``: of both arms together, where units are not all that was seen. It is what grows as the units of a
    fixed population come back: a sequence in the number of units would stand still and be looked at again and again.
    """
    variances = variance_of(treatment), variance_of(control)
    if treatment.mean is None or control.mean is None or variances[0] is None or variances[1] is None:
        return None
    value = (treatment.centre - control.centre) + (_offset(treatment) - _offset(control))
    if abs(value) <= NOISE * max(map(abs, (treatment.mean, control.mean, treatment.centre, control.centre))):
        value = 0.0
    own, share = variances[0] + variances[1], treatment.x / (treatment.x + control.x)
    return Effect(
        value=value,
        se=math.sqrt(max(own, _null_variance(treatment, control, control.mean + value * share) if value else own)),
        control=control.mean,
        variances=(variances[0], variances[1]),
        units=(treatment.n, control.n),
        observations=max(observations, treatment.n + control.n),
    )


@dataclass(frozen=True, slots=True)
class Sequential:
    """Asymptotic confidence sequences: valid at all times at once, so that looking decides nothing.

    Waudby-Smith, Arbour, Sinha, Kennedy & Ramdas, Ann. Statist. 52(6), 2024 (arXiv 2103.06476), with their choice of ρ.
    N counts observations of both arms, and the two-sided interval's

        half = se · √( 2(Nρ²+1)/(Nρ²) · ln(√(Nρ²+1)/α) )

    The one-sided bound has ln(1 + √(Nρ²+1)/(2α)) for the logarithm. ``units``: the N at which the intervals are
    narrowest, chosen before the data.
    """

    units: int

    def half_width(self, effect: Effect, alpha: float) -> float:
        """Half of the two-sided interval's width."""
        factor, growth = self._spread(effect, _rho_squared(alpha, self.units))
        return effect.se * math.sqrt(factor * (0.5 * math.log(growth) - math.log(alpha)))

    def one_sided_width(self, effect: Effect, alpha: float) -> float:
        """How far below the estimate its lower bound lies (or above it its upper one)."""
        factor, growth = self._spread(effect, _rho_squared(2 * alpha, self.units))
        return effect.se * math.sqrt(factor * math.log(1 + math.sqrt(growth) / (2 * alpha)))

    def p_value(self, effect: Effect, alpha: float) -> float:
        """The level at which :meth:`half_width`, with the ρ of ``alpha``, begins to leave 0 out; always valid."""
        if not effect.value:
            return 1.0
        factor, growth = self._spread(effect, _rho_squared(alpha, self.units))
        z = effect.value / effect.se
        return min(1.0, math.exp(min(0.0, 0.5 * math.log(growth) - z * z / factor)))

    def shrunken(self, effect: Effect, alpha: float) -> float:
        """The effect's mean under the sequence's own mixing distribution, N(0, ρ²σ²): value · Nρ² / (Nρ² + 1).

        An experiment that ends once its interval leaves 0 out ends while the estimate is too large; this one is not.
        """
        grown = effect.observations * _rho_squared(alpha, self.units)
        return effect.value * grown / (grown + 1)

    @staticmethod
    def _spread(effect: Effect, rho_squared: float) -> tuple[float, float]:
        """(2(Nρ²+1)/(Nρ²), Nρ²+1)."""
        grown = effect.observations * rho_squared
        return 2 * (grown + 1) / grown, grown + 1


@dataclass(frozen=True, slots=True)
class Fixed:
    """Student's interval and test with Welch's degrees of freedom, good for one look at a number of units that was
    declared before the data."""

    def half_width(self, effect: Effect, alpha: float) -> float:
        return effect.se * float(student.isf(alpha / 2, effect.degrees))

    def p_value(self, effect: Effect, alpha: float) -> float:
        if not effect.value:
            return 1.0
        return float(2 * student.sf(abs(effect.value) / effect.se, effect.degrees))


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


def _offset(moments: Moments) -> float:
    """r − centre."""
    return moments.power(1, 0) / moments.x


def _null_variance(treatment: Moments, control: Moments, ratio: float) -> float:
    """v₀ as above."""
    squares = (arm.square_around(ratio) / (arm.x / arm.n) ** 2 for arm in (treatment, control))
    return math.fsum(squares) / (treatment.n + control.n - 2) * (1 / treatment.n + 1 / control.n)


def _rho_squared(alpha: float, units: int) -> float:
    """ρ² that makes the sequence narrowest at ``units``; of the one-sided one, with 2α for ``alpha``."""
    log_term = -2 * math.log(alpha)
    return (log_term + math.log(log_term + 1)) / units
