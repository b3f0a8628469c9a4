"""Model strings: what is read is what is written, and nonsense is refused with words."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.errors import CallerError, InvalidCombination, InvalidRequest, NotFound
from serve.targets import (
    BASE,
    MAX_MEMBERS,
    Member,
    Registered,
    canonical,
    exact_members,
    parse,
    resolve,
    target_of,
)

NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,12}", fullmatch=True)
WEIGHTS = st.floats(-1e4, 1e4, allow_nan=False).filter(lambda w: w != 0)
MEMBERS = st.builds(Member, NAMES, st.none() | st.from_regex(r"[0-9a-f]{4,12}", fullmatch=True), WEIGHTS)
OLD = "0a" * 32


def registered(name: str, newest: str) -> Registered:
    return Registered(name, newest, {OLD: f"/a/{name}-old", newest: f"/a/{name}"}, {"latest": newest, "prod": OLD})


REGISTERED = {name: registered(name, f"{number}" * 64) for number, name in enumerate(("shape", "french"))}


@given(st.lists(MEMBERS, min_size=1, max_size=MAX_MEMBERS, unique_by=lambda m: m.name))
def test_what_is_written_is_read_back(members):
    assert sorted(parse(canonical(members)), key=str) == sorted(members, key=str)


@given(st.text(max_size=60))
def test_any_text_is_read_or_refused(text):
    try:
        assert all(isinstance(member, Member) for member in parse(text))
    except CallerError as error:
        assert error.message


@given(st.lists(st.sampled_from(["shape", "french"]), max_size=2, unique=True), st.floats(-100, 100))
def test_an_exact_target_means_the_same_ever_after(names, weight):
    members = [Member(name, None, weight) for name in names if weight]
    found = resolve(None, members, "base", REGISTERED) if members else resolve("base", None, "base", REGISTERED)
    newest = "9" * 64
    both = {
        name: replace(known, versions={**known.versions, newest: "/new"}, default=newest)
        for name, known in REGISTERED.items()
    }
    for read in (target_of(exact_members(found.exact), "x", "other", both), resolve(found.exact, None, "base", both)):
        assert set(read.adapters) == set(found.adapters)
    assert (found.exact == BASE) == (not members)


@pytest.mark.parametrize(
    ("text", "members"),
    [
        ("shape", [("shape", None, 1.0)]),
        ("shape:0.7+french:0.3", [("shape", None, 0.7), ("french", None, 0.3)]),
        ("a:1e+3+b:-0.5", [("a", None, 1000.0), ("b", None, -0.5)]),
        ("a@3f9a:+.5 + b", [("a", "3f9a", 0.5), ("b", None, 1.0)]),
        ("shape:0+french", [("french", None, 1.0)]),
    ],
)
def test_spellings(text, members):
    assert [(m.name, m.version, m.weight) for m in parse(text)] == members


@pytest.mark.parametrize(
    "text", ["", "+", "a+", "+a", "a:", "a::1", "a:x", "a@", "a b", "ä", "a:1:2", "x" * 5000, "../a"]
)
def test_malformed_names_are_refused(text):
    with pytest.raises(InvalidRequest):
        parse(text)


@pytest.mark.parametrize(
    "text", ["a:nan", "a:inf", "a:-Infinity", "a:1e999", "a:1+a:1", "+".join(f"a{i}" for i in range(20))]
)
def test_senseless_combinations_are_refused(text):
    with pytest.raises(InvalidCombination):
        parse(text)


def test_resolution():
    target = resolve("french:0.3 + shape:0.7", None, "base", REGISTERED)
    assert target.label == "french:0.3+shape:0.7"
    assert [(ref.name, ref.weight) for ref in target.adapters] == [("french", 0.3), ("shape", 0.7)]
    assert resolve("base", None, "base", REGISTERED).adapters == ()
    assert resolve("shape:0", None, "base", REGISTERED).label == "base"
    assert resolve(None, [Member("shape", "000")], "base", REGISTERED).adapters[0].version == "0" * 64
    with pytest.raises(NotFound, match="Did you mean shape"):
        resolve("shap", None, "base", REGISTERED)
    with pytest.raises(NotFound, match="version"):
        resolve("shape@111", None, "base", REGISTERED)
    with pytest.raises(InvalidRequest):
        resolve("shape", [Member("french")], "base", REGISTERED)
