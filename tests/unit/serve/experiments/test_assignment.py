"""Who gets which arm: the same everywhere and always, in the right shares, and moving nobody without need."""

from __future__ import annotations

import hashlib
import json
import math
import unicodedata
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from serve.experiments import assignment
from serve.experiments.assignment import (
    Draw,
    Subject,
    language_of,
    normal,
    uniform,
    unit_digest,
    unit_of,
)
from serve.experiments.definition import Arm, Condition

VECTORS = json.loads((Path(assignment.__file__).parent / "vectors.json").read_text())
UNITS = [f"user-{number}" for number in range(100_000)]


def arms(**weights: float) -> list[Arm]:
    return [Arm(name=name, target="@base", weight=weight) for name, weight in weights.items()]


def draw(experiment: str = "exp_1", number: int = 1, coverage: float = 1.0, **weights: float) -> Draw:
    return Draw(experiment, number, arms=arms(**weights), coverage=coverage)


def given_arms(found: Draw) -> list[str | None]:
    return [found.arm_of(unit) for unit in UNITS]


def second_implementation(case: dict[str, Any], unit: str) -> str | None:
    """From the words of the module's docstring alone."""

    def h(salt: str) -> float:
        digest = hashlib.blake2b(salt.encode() + bytes([0]) + unit.encode(), digest_size=8).hexdigest()
        return (int(digest[:13], 16) + 0.5) / 2**52

    layer = case["layer"]
    if layer and not layer["start"] <= h("layer/" + layer["name"]) < layer["end"]:
        return None
    stem = f"{case['experiment']}/{case['draw']}"
    if h(f"gate/{stem}") >= case["coverage"]:
        return None
    scores = {name: -weight / math.log(h(f"arm/{stem}/{name}")) for name, weight in case["arms"].items() if weight}
    return max(scores, key=lambda name: scores[name])


@pytest.mark.parametrize("case", VECTORS["assignments"], ids=lambda case: case["experiment"])
def test_the_published_vectors(case: dict[str, Any]):
    layer = case["layer"] and (case["layer"]["name"], case["layer"]["start"], case["layer"]["end"])
    found = Draw(case["experiment"], case["draw"], arms=arms(**case["arms"]), coverage=case["coverage"], layer=layer)
    for unit, arm in case["units"].items():
        assert found.arm_of(unit) == arm == second_implementation(case, unit), unit
    assert any(not unit.isascii() for unit in case["units"])


def test_the_published_hashes():
    for vector in VECTORS["hashes"]:
        assert uniform(vector["salt"], vector["unit"]) == vector["h"]


@given(st.text(), st.text())
def test_the_hash_is_strictly_between_0_and_1(salt: str, unit: str):
    try:
        (salt + unit).encode()
    except UnicodeEncodeError:
        return  # lone surrogates never get past the request's check
    assert 0.0 < uniform(salt, unit) < 1.0


@pytest.mark.parametrize(
    "weights", [{"a": 1, "b": 1}, {"a": 9, "b": 1}, {"a": 0.4, "b": 0.3, "c": 0.3}, {"a": 1, "b": 1, "c": 1, "d": 97}]
)
def test_shares_are_the_weights(weights: dict[str, float]):
    counts = Counter(given_arms(draw(**weights)))
    for arm, weight in weights.items():
        share = weight / sum(weights.values())
        assert binomtest(counts[arm], len(UNITS), share).pvalue > 1e-4, (arm, counts)


def test_the_gate_lets_in_its_share_of_every_arm():
    """With one salt for both, a 20 % gate would let in one arm only."""
    counts = Counter(given_arms(draw(coverage=0.2, a=1, b=1)))
    for arm in "ab":
        assert binomtest(counts[arm], len(UNITS), 0.1).pvalue > 1e-4, counts


def test_a_ramp_moves_nobody():
    before: list[str | None] = [None] * len(UNITS)
    for coverage in (0.01, 0.05, 0.1, 0.25, 0.5, 1.0):
        after = given_arms(draw(coverage=coverage, a=1, b=1))
        assert not [1 for old, new in zip(before, after, strict=True) if old is not None and old != new]
        share = sum(arm is not None for arm in after)
        assert binomtest(share, len(UNITS), coverage).pvalue > 1e-4 if coverage < 1 else share == len(UNITS)
        before = after


def test_a_further_arm_moves_nobody_between_the_others(capsys):
    two, three = given_arms(draw(a=1, b=1)), given_arms(draw(a=1, b=1, c=1))
    moved = [(old, new) for old, new in zip(two, three, strict=True) if old != new]
    assert {new for _, new in moved} == {"c"}
    back = given_arms(draw(a=1, c=1))
    assert not [1 for old, new in zip(three, back, strict=True) if old != new and old != "b"]
    with capsys.disabled():
        print(f"\na third arm takes {len(moved) / len(UNITS):.1%} of the units, and moves none between the old ones")
    assert len(moved) / len(UNITS) == pytest.approx(1 / 3, abs=0.01)


def test_other_weights_move_as_few_as_they_must():
    before, after = given_arms(draw(a=4, b=3, c=3)), given_arms(draw(a=5, b=2.5, c=2.5))
    moved = [new for old, new in zip(before, after, strict=True) if old != new]
    assert set(moved) == {"a"}, "only to whom more is due"
    assert binomtest(len(moved), len(UNITS), 0.1).pvalue > 1e-4


def test_experiments_and_draws_are_independent():
    first = given_arms(draw(a=1, b=1))
    for other in (draw("exp_2", a=1, b=1), draw(number=2, a=1, b=1)):
        same = sum(x == y for x, y in zip(first, given_arms(other), strict=True))
        assert binomtest(same, len(UNITS), 0.5).pvalue > 1e-4


def test_a_layer_shares_no_unit():
    left = Draw("exp_1", 1, arms=arms(a=1, b=1), coverage=1.0, layer=("l", 0.0, 0.6))
    right = Draw("exp_2", 1, arms=arms(a=1, b=1), coverage=1.0, layer=("l", 0.6, 1.0))
    both = list(zip(given_arms(left), given_arms(right), strict=True))
    assert all((x is None) != (y is None) for x, y in both)
    counts = Counter(x for x, _ in both)
    for arm, share in (("a", 0.3), ("b", 0.3), (None, 0.4)):
        assert binomtest(counts[arm], len(UNITS), share).pvalue > 1e-4


def test_a_request_without_a_unit_is_one_of_its_own():
    found = draw(a=1, b=1)
    seen = {found.arm(Subject(unit=None, request_id=f"r{number}")) for number in range(50)}
    assert seen == {"a", "b"}
    assert found.arm(Subject(unit="u", request_id="r1")) == found.arm(Subject(unit="u", request_id="r2"))


@pytest.mark.parametrize(
    ("condition", "is_met"),
    [
        ({"attribute": "tenant", "any_of": ["acme"]}, True),
        ({"attribute": "tenant", "any_of": ["4f3a"]}, True),
        ({"attribute": "tenant", "none_of": ["acme"]}, False),
        ({"attribute": "has_image", "any_of": ["true"]}, True),
        ({"attribute": "language", "any_of": ["de", "fr"]}, True),
        ({"attribute": "header.X-Plan", "any_of": ["pro"]}, True),
        ({"attribute": "metadata.plan", "any_of": ["pro"]}, False),
        ({"attribute": "metadata.absent", "any_of": ["x"]}, False),
        ({"attribute": "metadata.absent", "none_of": ["x"]}, True),
    ],
)
def test_conditions(condition: dict[str, Any], is_met: bool):
    subject = Subject(
        **{"unit": "u", "request_id": "r", "tenant": ("4f3a", "acme"), "has_image": True, "language": "de"},
        headers={"x-plan": "pro"},
        metadata={"plan": "free"},
    )
    only = Draw("exp_1", 1, arms=arms(a=1), coverage=1.0, conditions=[Condition.model_validate(condition)])
    assert (only.arm(subject) is not None) == is_met


def test_the_unit_is_whom_the_first_says():
    headers = {"x-experiment-unit": "h", "x-session-id": "s"}
    metadata = {"experiment_unit": "m"}
    assert unit_of(headers, metadata, "safety", "user") == "h"
    assert unit_of({"x-session-id": "s"}, metadata, "safety", "user") == "m"
    assert unit_of({"x-session-id": "s"}, {}, "safety", "user") == "safety"
    assert unit_of({"x-session-id": "s"}, {"experiment_unit": ""}, None, "user") == "user"
    assert unit_of({"x-session-id": "s"}, {}, None, None) == "s"
    assert unit_of({}, {}, None, None) is None


@given(st.text(min_size=1))
def test_a_unit_has_one_spelling(unit: str):
    composed, decomposed = (unicodedata.normalize(form, unit) for form in ("NFC", "NFD"))
    found = {unit_of({}, {}, None, f"{before}{spelled}{before}") for spelled in (composed, decomposed, unit)
             for before in ("", " ", "\t")}  # fmt: skip
    assert len(found) == 1
    (one,) = found
    assert one is None or (one == one.strip() == unicodedata.normalize("NFC", one) and one)
    assert normal("ADA") != normal("ada")


def test_a_unit_is_one_whichever_way_it_is_named():
    """A header's UTF-8 arrives as Latin-1."""
    for unit in ("Zoë", "张伟", "😀"):
        assert unit_of({"x-experiment-unit": unit.encode().decode("latin-1")}, {}, None, None) == unit
    assert unit_of({"x-experiment-unit": "Zo\xeb"}, {}, None, None) == "Zoë", "and what is Latin-1 stays so"


def test_what_is_stored_of_a_unit_says_nothing_of_it():
    assert len(unit_digest("exp_1", "me@example.com")) == 32
    assert unit_digest("exp_1", "u") != unit_digest("exp_2", "u") != unit_digest("exp_2", "u", "secret")


@pytest.mark.parametrize(
    ("header", "language"),
    [("de-CH,de;q=0.9", "de"), ("EN", "en"), ("", ""), ("*", ""), ("x" * 9000, ""), (" fr ; q=1", "fr")],
)
def test_languages(header: str, language: str):
    assert language_of(header) == language
