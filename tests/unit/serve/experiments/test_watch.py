"""What a look leads to."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from types import SimpleNamespace

import pytest

from serve.experiments.analysis import results_of
from serve.experiments.evidence import Evidence
from serve.experiments.results import GuardrailResult, Results
from serve.watch import Watch
from tests.unit.serve.experiments.worlds import NOW, experiment

RUNNING = experiment("a", "b")


class Experiments:
    """Gives a result to look at, and remembers what was done."""

    def __init__(self, found: Results | None) -> None:
        self._found = found
        self.done: list[str] = []

    async def look(self, *_: object) -> Results | None:
        return self._found

    async def act(self, name: str, action: str, *_: object, reason: str) -> None:
        self.done.append(f"{action}: {reason}")

    async def step(self, *_: object) -> None:
        self.done.append("step")


def looked_at(*actions: str, is_mismatch: bool = False) -> Results:
    """Results in which guardrails with these actions are breached."""
    rails = [
        GuardrailResult(metric="m", arm="b", tolerance=0.1, action=a, harm=0.5, at_least=0.3, is_breached=True)
        for a in actions
    ]
    plain = results_of(RUNNING, Evidence(arms={}), NOW)
    return replace(plain, guardrails=rails, shares=replace(plain.shares, is_mismatch=is_mismatch))


@pytest.mark.parametrize(
    ("found", "done"),
    [
        (None, []),  # another gateway just looked
        (looked_at(), ["step"]),
        (looked_at("alert"), []),
        (looked_at(is_mismatch=True), []),
        (looked_at("alert", "pause"), ["pause: guardrail m: 'b'"]),
        (looked_at("pause", "roll_back"), ["roll_back: guardrail m: 'b'"]),
    ],
)
async def test_a_ramp_goes_on_only_where_nothing_speaks_against_it(found: Results | None, done: list[str]):
    experiments = Experiments(found)
    await Watch(None, experiments, every_s=1.0).look(RUNNING)  # type: ignore[arg-type]
    assert [said[: len(wanted)] for said, wanted in zip(experiments.done, done, strict=True)] == done


async def test_sums_are_kept_up_whatever_becomes_of_one_try():
    tries = asyncio.Event()

    class Failing(Experiments):
        async def keep_up(self) -> None:
            self.done.append("keep up")
            if len(self.done) == 2:
                tries.set()
            raise OSError("the database is away")

    watch = Watch(SimpleNamespace(experiments=[]), Failing(None), every_s=0.01)  # type: ignore[arg-type]
    watch.start()
    await asyncio.wait_for(tries.wait(), 10)
    await watch.stop()
