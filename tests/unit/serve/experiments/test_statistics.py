"""The statistics against other people's code, and against simulated worlds whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, dirichlet_multinomial, multinomial
from statsmodels.api import OLS
from statsmodels.stats.proportion import proportions_ztest
from statsmodels.stats.proportion import test_proportions_2indep as compared_proportions
from statsmodels.stats.weightstats import CompareMeans, DescrStatsW

from serve.experiments.moments import Moments, terms
from serve.experiments.statistics import (
    SRM_ALPHA,
    SRM_CONCENTRATION,
    Effect,
    Fixed,
    Sequential,
    effect_of,
    mismatch_p_value,
    variance_of,
)


def sums(y: np.ndarray, x: np.ndarray | None = None, *, is_binary: bool = False) -> Moments:
    return Moments.of(y, np.ones_like(y) if x is None else x, is_binary=is_binary)


def plain(value: float, se: float, n: int, control: float = 1.0) -> Effect:
    """Of two arms of ``n`` units together, whose variances are alike."""
    half = n // 2
    return Effect(
        value=value,
        se=se,
        control=control,
        variances=(se * se / 2, se * se / 2),
        units=(n - half, half),
        observations=n,
    )


def test_a_mean_over_units_is_welchs():
    """The smaller arm varies more, so that its own variance counts more than the pooled one."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(3, 2, 400), rng.normal(3.2, 5, 250)
    effect = effect_of(sums(b), sums(a))
    assert effect is not None
    oracle = CompareMeans(DescrStatsW(b), DescrStatsW(a))
    low, high = oracle.tconfint_diff(alpha=0.05, usevar="unequal")
    width = Fixed().half_width(effect, 0.05)
    assert (effect.value - width, effect.value + width) == pytest.approx((low, high), rel=1e-9)
    assert Fixed().p_value(effect, 0.05) == pytest.approx(oracle.ttest_ind(usevar="unequal")[1], rel=1e-6)


@pytest.mark.parametrize(
    ("successes", "units"), [((30, 700), (1000, 9000)), ((700, 30), (9000, 1000)), ((5, 9), (90, 90))]
)
def test_a_share_is_compared_by_the_pooled_test_where_that_is_more_careful(successes, units):
    """9:1, and the small arm has drawn few successes: its own variance would be too small by the same luck."""
    arms = [Moments.of(np.arange(n) < k, np.ones(n), is_binary=True) for k, n in zip(successes, units, strict=True)]
    effect = effect_of(*arms)
    assert effect is not None
    own = compared_proportions(successes[0], units[0], successes[1], units[1], method="wald").statistic
    pooled = proportions_ztest(successes, units)[0]
    # statsmodels divides by n where sample variances divide by n - 1.
    assert effect.value / math.sqrt(sum(effect.variances)) == pytest.approx(own, rel=1e-2)
    assert effect.value / effect.se == pytest.approx(min(own, pooled, key=abs), rel=1e-2)
    assert abs(effect.value / effect.se) < max(abs(own), abs(pooled)) * 0.999 or units[0] == units[1]


def test_the_relative_effect_is_fiellers_and_leaves_zero_out_with_the_absolute_one():
    rng = np.random.default_rng(6)
    for _ in range(300):
        a, b = rng.normal(2, 1, 200), rng.normal(2 + rng.normal(0, 0.3), rng.uniform(0.5, 3), 60)
        effect = effect_of(sums(b), sums(a))
        assert effect is not None
        width = Fixed().half_width(effect, 0.05)
        found = effect.relative(width)
        assert found is not None
        relative, low, high = found
        assert relative == pytest.approx(b.mean() / a.mean() - 1)
        assert (low > 0, high < 0) == (effect.value > width, effect.value < -width)
        # The ends are where the linear contrast b - (1 + end)·a is as far from 0 as the interval says.
        v1, v0 = (v * effect.se**2 / sum(effect.variances) for v in effect.variances)
        for end in (low, high):
            contrast = b.mean() - (1 + end) * a.mean()
            assert contrast**2 == pytest.approx((width / effect.se) ** 2 * (v1 + (1 + end) ** 2 * v0), rel=1e-6)
    assert effect_of(sums(rng.normal(0, 1, 50)), sums(rng.normal(0, 1, 50))).relative(1.0) is None


def test_a_ratio_over_units_is_the_regression_with_clusters():
    """Each unit's requests share its luck; statsmodels clusters them, the delta method never sees them."""
    rng = np.random.default_rng(1)
    num_units = 500
    counts = rng.integers(1, 12, num_units)
    luck = rng.normal(0, 1, num_units)
    unit = np.repeat(np.arange(num_units), counts)
    values = luck[unit] + rng.normal(0, 0.5, len(unit))
    found = sums(np.bincount(unit, values), counts.astype(float))
    fitted = OLS(values, np.ones(len(values))).fit(
        cov_type="cluster", cov_kwds={"groups": unit, "use_correction": False}
    )
    assert found.mean == pytest.approx(fitted.params[0], rel=1e-9)
    # statsmodels divides by n where the delta method's sample variance divides by n - 1.
    assert variance_of(found) == pytest.approx(fitted.bse[0] ** 2 * num_units / (num_units - 1), rel=1e-9)
    naive = values.var(ddof=1) / len(values)
    assert variance_of(found) > 3 * naive, "requests taken for independent would look far too certain"


@given(st.floats(-3, 3), st.floats(1e-3, 2), st.integers(20, 100_000), st.sampled_from([0.05, 0.01, 0.025]))
def test_the_p_value_is_where_the_interval_meets_zero(value: float, se: float, n: int, alpha: float):
    """Found by bisection on the interval with ρ held, so the closed form is checked against its definition."""
    sequential, effect = Sequential(5000), plain(value, se, n)
    p_value = sequential.p_value(effect, alpha)
    is_outside = abs(value) > sequential.half_width(effect, alpha)
    assert is_outside == (p_value < alpha) or math.isclose(p_value, alpha, rel_tol=1e-9)
    log_term = -2 * math.log(alpha)
    rho2 = (log_term + math.log(log_term + 1)) / 5000

    def half(level: float) -> float:
        grown = n * rho2 + 1
        return se * math.sqrt(n) * math.sqrt(2 * grown / (n * n * rho2) * math.log(math.sqrt(grown) / level))

    assert half(alpha) == pytest.approx(sequential.half_width(effect, alpha), rel=1e-12)
    if 1e-200 < p_value < 1:
        assert half(p_value) == pytest.approx(abs(value), rel=1e-6)


def test_the_interval_is_narrowest_where_it_was_asked_to_be():
    def boundary(units: int) -> float:
        effect = plain(0.0, 1 / math.sqrt(4000), 4000)
        return Sequential(units).half_width(effect, 0.05)

    assert min(range(1000, 10_000, 500), key=boundary) in range(3000, 5001)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.9, 0.1), (0.2, 0.3, 0.5)])
def test_the_mismatch_test_is_a_ratio_of_scipys_likelihoods(shares: tuple[float, ...]):
    rng = np.random.default_rng(2)
    for n in (10, 1000, 100_000):
        counts = rng.multinomial(n, rng.dirichlet(np.array(shares) * 200))
        prior = dirichlet_multinomial.logpmf(counts, np.array(shares) * SRM_CONCENTRATION, n)
        factor = prior - multinomial.logpmf(counts, n, shares)
        # scipy's log-gamma loses digits in sums over 1e5
        assert mismatch_p_value(list(counts), shares) == pytest.approx(math.exp(-max(0, factor)), rel=1e-4)


def test_weights_need_not_sum_to_one():
    assert mismatch_p_value([90, 310], [1, 3]) == mismatch_p_value([90, 310], [0.25, 0.75])
    assert mismatch_p_value([0, 0], [1, 1]) == 1.0


@pytest.mark.slow
def test_the_mismatch_test_is_right_under_peeking_and_sees_what_matters():
    """1,000 right worlds, 50 looks each, beside a chi-square test at the same level; then worlds with a fault."""
    rng = np.random.default_rng(3)
    looks = range(400, 20_001, 400)
    false, false_fixed = 0, 0
    for _ in range(1000):
        ones = (rng.random(20_000) < 0.5).cumsum()
        counts = [(int(ones[n - 1]), int(n - ones[n - 1])) for n in looks]
        false += any(mismatch_p_value(pair, (1, 1)) < SRM_ALPHA for pair in counts)
        false_fixed += any(chisquare(pair).pvalue < SRM_ALPHA for pair in counts)
    print(f"\nmismatch, 1,000 worlds without one, 50 looks at 0.001: {false} alarms; chi-square {false_fixed}")
    assert false <= 3
    seen = [mismatch_p_value((int(k), 5000 - int(k)), (1, 1)) < SRM_ALPHA for k in rng.binomial(5000, 0.55, 300)]
    assert np.mean(seen) > 0.95


def test_an_outcome_that_never_varied_is_not_certain():
    always, never = (sums(np.full(30, value), is_binary=True) for value in (1.0, 0.0))
    effect = effect_of(always, never)
    assert effect is not None and effect.se > 0.03
    equal = effect_of(sums(np.full(30, 2.0)), sums(np.full(30, 2.0)))
    assert equal is not None and (equal.value, equal.se) == (0.0, 0.0)
    assert Sequential(100).p_value(equal, 0.05) == Fixed().p_value(equal, 0.05) == 1.0
    apart = effect_of(*(Moments.of(np.zeros(30), np.ones(30), centre=centre) for centre in (0.01, 0.03)))
    assert apart is not None and apart.value == 0.0, "sums around other centres differ by rounding only"
    assert effect_of(Moments(), never) is None and effect_of(always, sums(np.ones(1))) is None


@pytest.mark.parametrize("side", ["two", "one"])
def test_intervals_cover_at_every_time(side: str):
    """Coverage over whole paths, of a skewed outcome: the truth stays inside from the first look to the last."""
    rng = np.random.default_rng(4)
    truth, covered, runs = 0.25, 0, 500
    for _ in range(runs):
        means = (1.0 + truth, 1.0)
        grown = [np.cumsum(terms(mean, rng.exponential(mean, 4000), np.ones(4000)), axis=1) for mean in means]
        inside = True
        for n in range(100, 4001, 100):
            arms = (Moments(n=n, centre=c, sums=tuple(g[:, n - 1])) for c, g in zip(means, grown, strict=True))
            effect = effect_of(*arms)
            assert effect is not None
            if side == "two":
                inside &= abs(effect.value - truth) <= Sequential(4000).half_width(effect, 0.05)
            else:
                inside &= effect.value - Sequential(4000).one_sided_width(effect, 0.05) <= truth
        covered += inside
    assert covered / runs >= 0.95
