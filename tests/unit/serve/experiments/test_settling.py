"""A fixed analysis says one thing once, and what an experiment was decided on stays as it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from serve.experiments.analysis import results_of
from serve.experiments.evidence import ArmEvidence, Evidence
from serve.experiments.moments import Moments
from serve.experiments.settling import is_complete, shown
from serve.registry.database import Database
from serve.registry.settled import SettledResults
from tests.gateways import gateway
from tests.unit.serve.experiments.worlds import NOW, experiment

FIXED = {"kind": "fixed", "units": 60, "min_units": 10}


def rated(n: int, good: int) -> Moments:
    return Moments.of(np.arange(n) < good, np.ones(n), is_binary=True)


def evidence(**arms: tuple[int, int, int]) -> Evidence:
    """By arm: units exposed, units with data, and how many of these are good."""
    return Evidence(
        arms={
            name: ArmEvidence(units=units, requests=units, metrics={"solved": rated(n, good)})
            for name, (units, n, good) in arms.items()
        }
    )


def test_a_fixed_number_is_of_units_with_data():
    """All are exposed, and few have reported: the first reports are not the sample that was planned."""
    found = experiment("a", "b", analysis=FIXED)
    early = results_of(found, evidence(a=(500, 25, 5), b=(500, 25, 22)), NOW)
    assert early.winner is None and early.comparisons[0].p_value is None and not is_complete(early)
    assert early.note.startswith("50 of the declared 60 units have data in solved")
    there = results_of(found, evidence(a=(500, 30, 6), b=(500, 30, 27)), NOW)
    assert there.winner == "b" and is_complete(there)
    assert not is_complete(replace(there, state="paused"))


def test_a_complete_analysis_stays_while_guardrails_go_on():
    found = experiment("a", "b", analysis=FIXED, guardrails=[{"metric": "solved", "tolerance": 0.1}])
    settled = replace(results_of(found, evidence(a=(30, 30, 6), b=(30, 30, 27)), NOW), settled="complete")
    turned = results_of(found, evidence(a=(300, 300, 250), b=(300, 300, 60)), NOW)
    assert turned.winner == "a"
    later = shown(settled, turned)
    assert (later.winner, later.comparisons, later.note) == ("b", settled.comparisons, settled.note)
    assert later.guardrails == turned.guardrails and later.guardrails[0].is_breached
    assert later.later is not None and later.later.units == 600 and later.arms == settled.arms
    lost = results_of(found, evidence(a=(900, 300, 60), b=(300, 300, 60)), NOW)
    doubtful = shown(settled, lost)
    assert doubtful.winner is None and "no winner is named" in doubtful.note
    assert {compared.verdict for compared in doubtful.comparisons} == {"withheld"}


def test_the_first_results_are_kept_and_a_decision_goes_before_them(url: str):
    database = Database(url)
    try:
        settled = SettledResults(database)
        assert settled.of("e", 1) is None
        for number in (1, 2):
            settled.settle("e", 1, "complete", {"number": number})
        assert settled.of("e", 1) == {"number": 1} and settled.of("e", 2) is None
        for number in (3, 4):
            settled.settle("e", 1, "decided", {"number": number})
        assert settled.of("e", 1) == {"number": 3}
    finally:
        database.close()


@pytest.fixture
async def http(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[httpx.AsyncClient]:
    monkeypatch.setattr("serve.experiments.recorder.FLUSH_S", 0.01)
    async with gateway(tmp_path, {"engine": {"kind": "fake"}}) as running:
        async with running.client("admin") as client:
            yield client


async def answer(http: httpx.AsyncClient, method: str, path: str, body: Any = None) -> dict[str, Any]:
    for _ in range(50):
        found = await http.request(method, path, json=body)
        if found.status_code != 401:
            break
        await asyncio.sleep(0.1)  # the gateway has not seen the key yet
    assert found.status_code < 300, found.text
    return dict(found.json())


async def visit(http: httpx.AsyncClient, users: range, good: dict[str, bool]) -> None:
    """Each of ``users`` asks once, and reports what the arm is ``good`` for."""
    for number in users:
        body = {"model": "chosen", "prompt": "hi", "max_tokens": 1, "user": f"user-{number}"}
        asked = await http.post("/v1/completions", json=body)
        assert asked.status_code == 200, asked.text
        report = {"request_id": asked.json()["id"], "metric": "solved"}
        await answer(http, "POST", "/v1/feedback", {**report, "value": good[asked.headers["x-variant"]]})


@pytest.mark.parametrize("kind", ["fixed", "sequential"])
async def test_what_comes_later_is_shown_apart(http: httpx.AsyncClient, kind: str):
    arms = [{"name": name, "target": "base"} for name in ("old", "new")]
    analysis = {"kind": kind, "units": 60, "min_units": 10}
    said = {"name": "x", "alias": "chosen", "arms": arms, "metrics": [{"name": "solved"}], "decision_metric": "solved"}
    await answer(http, "POST", "/v1/experiments", {**said, "analysis": analysis})
    await answer(http, "POST", "/v1/experiments/x/run", {})
    await visit(http, range(100), {"old": False, "new": True})
    first = (await answer(http, "GET", "/v1/experiments/x/results"))["results"]
    assert first["winner"] == "new" and first["settled"] == ("complete" if kind == "fixed" else None)
    if kind == "fixed":
        await visit(http, range(100, 400), {"old": True, "new": False})
        second = (await answer(http, "GET", "/v1/experiments/x/results"))["results"]
        assert second["comparisons"] == first["comparisons"] and second["arms"] == first["arms"]
        assert second["winner"] == "new" and second["later"]["units"] == 400
    waiting = []
    for number in range(500, 560):
        body = {"model": "chosen", "prompt": "hi", "max_tokens": 1, "user": f"user-{number}"}
        asked = await http.post("/v1/completions", json=body)
        waiting.append((asked.json()["id"], asked.headers["x-variant"]))
    await answer(http, "POST", "/v1/experiments/x/decide", {"arm": "new", "reason": "it is better"})
    decided = (await answer(http, "GET", "/v1/experiments/x/results"))["results"]
    assert decided["settled"] == "decided" and decided["winner"] == "new" and decided["state"] == "decided"
    for request, arm in waiting:
        report = {"request_id": request, "metric": "solved", "value": arm == "old"}
        await answer(http, "POST", "/v1/feedback", report)
    after = (await answer(http, "GET", "/v1/experiments/x/results"))["results"]
    assert {**after, "later": None} == {**decided, "later": None}
    before, now = (
        sum(arm["metrics"]["solved"]["units"] for arm in found["later"]["arms"]) for found in (decided, after)
    )
    assert now == before + 60
    await answer(http, "POST", "/v1/experiments/x/roll_back", {"reason": "enough"})
    await answer(http, "POST", "/v1/experiments/x/archive", {})
    kept = (await answer(http, "GET", "/v1/experiments/x/results"))["results"]
    assert {**kept, "later": None, "state": "decided"} == {**decided, "later": None} and kept["state"] == "archived"
