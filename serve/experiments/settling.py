"""When results stay as they are, and how they are shown once more has come in."""

from __future__ import annotations

from dataclasses import replace

from serve.experiments.phases import Action
from serve.experiments.records import COLLECTING
from serve.experiments.results import Later, Results

SETTLING = frozenset({Action.DECIDE, Action.ROLL_BACK})
"""Actions whose grounds must stay readable as they were: reports that come later change nothing of them."""


def is_complete(results: Results) -> bool:
    """Whether a fixed analysis has reached its number while it collects: this look is the one that it may have."""
    return (
        results.needed_units is not None
        and results.units_with_data >= results.needed_units
        and results.state in COLLECTING
    )


def shown(settled: Results, live: Results) -> Results:
    """``settled`` as it is shown when ``live`` is what the evidence says.

    What was decided stays whole. Of a fixed analysis that is complete and runs on, the comparisons and what follows
    from them stay; guardrails and the check of the shares go on, and a mismatch takes the winner back.
    """
    later = Later(as_of=live.as_of, units=live.units, arms=live.arms)
    if settled.settled == "decided":
        return replace(settled, state=live.state, later=later)
    if live.shares.is_mismatch:
        withheld = [replace(compared, verdict="withheld") for compared in settled.comparisons]
        settled = replace(settled, comparisons=withheld, winner=None, note=live.note)
    return replace(settled, state=live.state, shares=live.shares, guardrails=live.guardrails, later=later)
