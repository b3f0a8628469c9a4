"""Whole experiments simulated through the real analysis: how often it errs, and how soon it sees what is there."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest

from serve.experiments.analysis import results_of
from tests.unit.serve.experiments.worlds import NOW, experiment, looks, returning

pytestmark = pytest.mark.slow

RUNS, LOOKS = 1000, 50


def test_two_equal_arms_looked_at_fifty_times(capsys):
    """A/A. The fixed analysis is asked at each look as though its declared number had been reached there."""
    rng, begun = np.random.default_rng(0), time.monotonic()
    sequential = experiment("a", "b", analysis={"units": 5000})
    fixed = experiment("a", "b", analysis={"kind": "fixed", "units": 10})
    found, found_fixed = 0, 0
    for _ in range(RUNS):
        winners, winners_fixed = False, False
        for evidence in looks(rng, {"a": 0.4, "b": 0.4}, units=5000, num_looks=LOOKS):
            winners |= results_of(sequential, evidence, NOW).winner is not None
            winners_fixed |= results_of(fixed, evidence, NOW).winner is not None
        found += winners
        found_fixed += winners_fixed
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(
            f"\nA/A, {RUNS} runs x {LOOKS} looks: a winner in {found / RUNS:.1%} (sequential), "
            f"{found_fixed / RUNS:.1%} (fixed z-test, peeked at); {seconds:.1f} s"
        )
    assert found / RUNS <= 0.05
    assert found_fixed / RUNS > 0.2, "peeking is not free, or this test shows nothing"


def test_a_real_effect_is_seen_and_when(capsys):
    rng, begun = np.random.default_rng(1), time.monotonic()
    running = experiment("a", "b", analysis={"units": 5000})
    stopped, wrong = [], 0
    for _ in range(RUNS):
        for number, evidence in enumerate(looks(rng, {"a": 0.40, "b": 0.44}, units=5000, num_looks=LOOKS), 1):
            winner = results_of(running, evidence, NOW).winner
            if winner is not None:
                stopped.append(10_000 * number // LOOKS)
                wrong += winner != "b"
                break
    seconds = time.monotonic() - begun
    with capsys.disabled():
        print(
            f"\nA/B, 40 % against 44 %, {RUNS} runs x {LOOKS} looks: seen in {len(stopped) / RUNS:.1%} by 10,000 "
            f"units, median at {statistics.median(stopped):.0f}, wrong arm in {wrong}; {seconds:.1f} s"
        )
    assert len(stopped) / RUNS > 0.9
    assert wrong <= 0.005 * RUNS


def test_users_who_come_back_do_not_make_it_err(capsys):
    """The sequence is over units, and here no unit is new: all that comes is more of the same ones."""
    rng, runs = np.random.default_rng(4), 300
    running = experiment("a", "b", analysis={"units": 5000})
    found = {}
    for units in (200, 2500):
        found[units] = sum(
            any(
                results_of(running, evidence, NOW).winner is not None
                for evidence in returning(rng, {"a": 0.4, "b": 0.4}, units=units, num_looks=LOOKS)
            )
            for _ in range(runs)
        )
    with capsys.disabled():
        print(f"\nA/A with the same users over {LOOKS} looks, {runs} runs: winners by units of an arm {found}")
    assert all(count / runs <= 0.05 for count in found.values())


def test_three_equal_arms_err_no_more_than_two(capsys):
    """Against control in two comparisons: Holm keeps the error of both together."""
    rng = np.random.default_rng(2)
    running, runs = experiment("a", "b", "c", "d", analysis={"units": 6000}), 300
    found = sum(
        any(
            results_of(running, evidence, NOW).winner is not None
            for evidence in looks(rng, dict.fromkeys("abcd", 0.4), units=2000, num_looks=25)
        )
        for _ in range(runs)
    )
    with capsys.disabled():
        print(f"\nA/A/A/A, {runs} runs x 25 looks: a winner in {found / runs:.1%}")
    assert found / runs <= 0.05


def test_a_guardrail_errs_seldom_and_sees_harm_soon(capsys):
    """From 20 units on, where normal approximations are at their worst."""
    rng, runs = np.random.default_rng(3), 400
    guarded = experiment("a", "b", metrics=[{"name": "solved", "direction": "down"}], guardrails=[{"metric": "solved"}])

    def first_breach(rates: dict[str, float]) -> int | None:
        for number, evidence in enumerate(looks(rng, rates, units=1000, num_looks=LOOKS), 1):
            if any(guardrail.is_breached for guardrail in results_of(guarded, evidence, NOW).guardrails):
                return 2 * 1000 * number // LOOKS
        return None

    false = sum(first_breach({"a": 0.05, "b": 0.05}) is not None for _ in range(runs))
    harmed = [first_breach({"a": 0.05, "b": 0.30}) for _ in range(runs)]
    seen = [units for units in harmed if units is not None]
    with capsys.disabled():
        print(
            f"\nguardrail at 0.05, {runs} runs x {LOOKS} looks: breached in {false / runs:.1%} without harm; "
            f"5 % against 30 %: in {len(seen) / runs:.1%}, median at {statistics.median(seen):.0f} units"
        )
    assert false / runs <= 0.05
    assert len(seen) == runs
