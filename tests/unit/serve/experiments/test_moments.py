"""Power sums around a centre against exact arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.experiments.moments import NOISE, Moments

Units = list[tuple[float, float]]


@st.composite
def units(draw: st.DrawFn, min_size: int = 1) -> Units:
    """y and x of each: values of one spread around one ratio, which may be large beside it; some have no x."""
    ratio = draw(st.sampled_from([0.0, 0.1, -3.0, 1e4, 1e8, -1e9]))
    spread = draw(st.sampled_from([0.0, 1e-2, 1.0, 1e3]))
    deviations = st.floats(-1, 1).map(lambda d: round(d, 6))
    drawn = draw(st.lists(st.tuples(deviations, st.integers(0, 30)), min_size=min_size, max_size=40))
    return [((ratio + spread * d) * x, float(x)) for d, x in drawn]


def arrays(found: Units) -> tuple[np.ndarray, np.ndarray]:
    both = np.array(found, dtype=np.float64).reshape(-1, 2)
    return both[:, 0], both[:, 1]


def exact_residuals(found: Units) -> tuple[Fraction, Fraction, Fraction]:
    there = [(Fraction(y), Fraction(x)) for y, x in found if x > 0]
    if not there:
        return Fraction(0), Fraction(0), Fraction(0)
    r = sum(y for y, _ in there) / sum(x for _, x in there)
    square, cube, fourth = (sum((y - r * x) ** k for y, x in there) for k in (2, 3, 4))
    return Fraction(square), Fraction(cube), Fraction(fourth)


def assert_exact(found: Moments, told: Units) -> None:
    """Means to rounding; residuals to what the rounding of each unit's y allows."""
    there = [(Fraction(y), Fraction(x)) for y, x in told if x > 0]
    assert found.n == len(there)
    assert found.x == float(sum(x for _, x in there))
    if not there:
        assert found.mean is None and found.residuals == (0, 0, 0)
        return
    size = float(sum(abs(y) for y, _ in there))
    y = float(sum(y for y, _ in there))
    assert found.y == pytest.approx(y, rel=1e-14, abs=1e-14 * size)
    assert found.mean is not None and found.mean * found.x == pytest.approx(y, rel=1e-14, abs=1e-14 * size)
    largest = max(float(abs(y)) for y, _ in there)
    blur = 4 * NOISE * largest
    wanted = exact_residuals(told)
    n = len(there)
    spread = math.sqrt(float(wanted[0]))
    for order, (value, exact) in enumerate(zip(found.residuals, map(float, wanted), strict=True), 2):
        # (s + blur)ᵏ − sᵏ, with s the largest residual there may be
        slack = n * ((spread + blur) ** order - spread**order)
        assert value == pytest.approx(exact, rel=1e-9, abs=slack + 1e-9 * spread**order)
    assert found.residuals.square >= 0 and found.residuals.fourth >= 0


@given(units())
def test_residuals_are_those_of_exact_arithmetic(told: Units):
    assert_exact(Moments.of(*arrays(told)), told)


@given(units(), units())
def test_parts_add_up_to_the_whole(one: Units, other: Units):
    both = Moments.of(*arrays(one + other))
    parts = [Moments.of(*arrays(found), centre=both.centre) for found in (one, other)]
    whole = parts[0] + parts[1]
    assert whole.n == both.n
    assert whole.sums == pytest.approx(both.sums, rel=1e-12, abs=1e-12 * max(map(abs, both.sums)))


@given(units(), st.floats(-3, 3).map(lambda shift: round(shift, 3)))
def test_another_centre_says_the_same(told: Units, shift: float):
    found = Moments.of(*arrays(told))
    scale = max((abs(y / x - found.centre) for y, x in told if x > 0), default=0.0)
    assert_exact(found.recentred(found.centre + shift * scale), told)


@given(st.floats(-1e9, 1e9), st.integers(1, 500), st.lists(st.integers(1, 50), min_size=1, max_size=50))
def test_what_never_varies_has_no_spread(value: float, times: int, heights: list[int]):
    """Of values that binary fractions do not hold, too; and of units that were added up one by one."""
    alike = Moments.of([value] * times, [1.0] * times)
    assert alike.residuals == (0.0, 0.0, 0.0)
    heavy = Moments.of([math.fsum([value] * x) for x in heights], heights)
    assert heavy.residuals == (0.0, 0.0, 0.0)


def test_a_small_spread_beside_a_large_offset_is_seen():
    rng = np.random.default_rng(0)
    y = 1e8 + 0.1 * rng.standard_normal(100_000)
    found = Moments.of(y, np.ones_like(y))
    assert found.residuals.square / found.n == pytest.approx(0.01, rel=0.02)
    exact = y.astype(np.longdouble)
    wanted = ((exact - exact.mean()) ** 2).sum()
    assert found.residuals.square == pytest.approx(float(wanted), rel=1e-6)


def test_nothing_is_neutral():
    some = Moments.of([1.0, 2.0], [1.0, 1.0], is_binary=False)
    assert some + Moments() == some == Moments() + some
    assert Moments().mean is None and Moments().y == Moments().x == 0
    with pytest.raises(AssertionError):
        some + Moments.of([1.0], [1.0], centre=0.5)
