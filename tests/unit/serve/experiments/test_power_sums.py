"""Sums in whole numbers against fractions: nothing is rounded, whatever comes in which order."""

from __future__ import annotations

import math
import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.experiments.moments import ORDERS, Moments
from serve.experiments.power_sums import BITS, PowerSums, fixed, of_units

values = st.floats(-1e9, 1e9, allow_subnormal=False)
units = st.lists(st.tuples(values, st.integers(0, 1000)), max_size=20)


def summed(told: list[tuple[float, int]]) -> PowerSums:
    found = PowerSums()
    for y, x in told:
        found.add(fixed(y), x)
    return found


@given(values)
def test_floats_are_held_exactly_or_to_2_to_the_minus_81(value: float):
    error = abs(Fraction(fixed(value), 1 << BITS) - Fraction(value))
    assert error <= Fraction(1, 1 << BITS + 1)
    assert error == 0 or abs(value) < 2.0**-28


@given(units, units, st.randoms(use_true_random=False))
def test_what_comes_and_goes_leaves_no_trace(
    stays: list[tuple[float, int]], goes: list[tuple[float, int]], rng: random.Random
):
    steps = [(y, x, 1) for y, x in stays + goes] + [(y, x, -1) for y, x in goes]
    rng.shuffle(steps)
    found = PowerSums()
    for y, x, times in steps:
        found.add(fixed(y), x, times)
    assert found == summed(stays)


@given(units)
def test_moments_are_rounded_once(told: list[tuple[float, int]]):
    found = summed(told).moments()
    there = [(Fraction(fixed(y), 1 << BITS), x) for y, x in told if x > 0]
    assert found.n == len(there)
    centre = Fraction(found.centre)
    for (i, j), value in zip(ORDERS, found.sums, strict=True):
        assert value == float(sum(((y - centre * x) ** i * x**j for y, x in there), Fraction(0)))
    if there:
        ratio = sum(y for y, _ in there) / sum(x for _, x in there)
        assert found.mean == pytest.approx(float(ratio), rel=1e-15, abs=2.0**-BITS)


def test_moments_are_those_of_arrays():
    rng = random.Random(0)
    told = [(rng.gauss(1e8, 0.1), rng.randint(1, 5)) for _ in range(200)]
    told = [(y * x, x) for y, x in told]
    found = summed(told).moments()
    wanted = Moments.of([y for y, _ in told], [x for _, x in told], centre=found.centre)
    assert found.sums == pytest.approx(wanted.sums, rel=1e-5, abs=1e-5)  # c·x is rounded there
    assert list(found.residuals) == pytest.approx(list(wanted.residuals), rel=1e-5)


@given(values, st.lists(st.integers(1, 1000), min_size=1, max_size=30))
def test_a_constant_never_varies(value: float, heights: list[int]):
    found = PowerSums()
    for x in heights:
        found.add(sum(fixed(value) for _ in range(x)), x)
    assert found.moments().residuals == (0.0, 0.0, 0.0)


def test_who_is_silent_counts_as_nothing():
    reported = summed([(2.0, 3), (1.0, 1)])
    everybody = PowerSums()
    for x in (3, 1, 2, 5):
        everybody.add(0, x)
    assert reported.with_silent(everybody) == summed([(2.0, 3), (1.0, 1), (0.0, 2), (0.0, 5)])
    assert PowerSums().with_silent(of_units(7)) == summed([(0.0, 1)] * 7)
    assert math.isclose(summed([(1.0, 1)]).with_silent(of_units(4)).moments().mean or 0, 0.25)
