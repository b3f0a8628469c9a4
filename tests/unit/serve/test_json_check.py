"""What a JSON body must be before it is validated."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from serve.gateway.json_check import (
    MAX_DEPTH,
    MAX_KEYS,
    MAX_STRUCTURE,
    BodyTooComplex,
    InvalidJson,
    InvalidText,
    check_json,
)
from serve.schemas.chat import ChatRequest
from serve.schemas.completions import CompletionRequest
from serve.schemas.experiments import ExperimentChange, NewExperiment
from serve.schemas.management import ClassifyBody
from serve.schemas.merges import MergeRequest

LONGEST = 200
"""More errors than any honest body has; each takes tens of microseconds."""


def nested(depth: int) -> bytes:
    return b"[" * depth + b"]" * depth


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"[" + b"1," * MAX_STRUCTURE + b"1]", BodyTooComplex, str(MAX_STRUCTURE)),
        (nested(MAX_DEPTH + 2), BodyTooComplex, "nested"),
        (nested(100_000), BodyTooComplex, "nested"),
        (json.dumps({"a": [dict.fromkeys(map(str, range(MAX_KEYS + 1)))]}).encode(), BodyTooComplex, "a[0]: 513 keys"),
        (b"[" + b"1" * 5000 + b"]", BodyTooComplex, "digits"),
        (b'{"a": [0, {"b": "x\\ud800"}]}', InvalidText, "a[1].b: character 1"),
        (b'{"a": {"\\udfff": 1}}', InvalidText, "a: the key \\udfff"),
        (b'"\\ude00\\ud83d"', InvalidText, "body: character 0"),
        (b'{"a": "x\\u0000"}', InvalidText, "U+0000"),
        (b'{"a": "\xed\xa0\x80"}', InvalidJson, "UTF-8"),
        ('{"a": 1}'.encode("utf-16"), InvalidJson, "UTF-8"),
        (b'{"a": ', InvalidJson, "character 6"),
    ],
)
def test_what_is_refused_names_what_and_where(body: bytes, error: type[Exception], words: str):
    with pytest.raises(error) as found:
        check_json(body, allows_nul=False)
    assert words in str(found.value)
    str(found.value).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"5",
        b"null",
        b'\xef\xbb\xbf{"a": 1}',
        nested(MAX_DEPTH),
        b'{"a": "\\ud83d\\ude00 \\\\ud800 \xf0\x9f\x98\x80"}',
        b'{"image": "' + b"A" * (1 << 20) + b'"}',
        json.dumps(list(range(100_000))).encode(),
    ],
)
def test_what_is_sound_passes(body: bytes):
    check_json(body, allows_nul=False)


def test_nul_passes_where_texts_are_prompts():
    check_json(b'{"a": "x\\u0000"}', allows_nul=True)


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(st.characters(), max_size=4),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(st.characters(), max_size=3), inner, max_size=4)
    ),
)


def texts(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, list):
        return [text for item in value for text in texts(item)]
    return [text for key, item in value.items() for text in (key, *texts(item))] if isinstance(value, dict) else []


@given(JSON)
def test_it_refuses_exactly_what_cannot_be_encoded(value: Any):
    body = json.dumps(value).encode()
    try:
        "".join(f"{text} " for text in texts(value)).encode()
    except UnicodeEncodeError:
        with pytest.raises(InvalidText):
            check_json(body, allows_nul=True)
    else:
        check_json(body, allows_nul=True)


BAD_LISTS: dict[str, tuple[type[BaseModel], str]] = {
    "content": (ChatRequest, '{"messages": [{"role": "user", "content": [%s]}]}'),
    "messages": (ChatRequest, '{"messages": [%s]}'),
    "contents": (ChatRequest, '{"messages": [{"role": "user", "content": [1]}, %s]}'),
    "adapters": (ChatRequest, '{"messages": [{"role": "user", "content": "hi"}], "adapters": [%s]}'),
    "stop": (ChatRequest, '{"messages": [{"role": "user", "content": "hi"}], "stop": [%s]}'),
    "modalities": (ChatRequest, '{"messages": [{"role": "user", "content": "hi"}], "modalities": [%s]}'),
    "prompt": (CompletionRequest, '{"prompt": [[1], %s]}'),
    "classified": (ClassifyBody, '{"messages": [{"role": "user", "content": [%s]}]}'),
    "arms": (NewExperiment, '{"name": "a", "alias": "b", "arms": [%s]}'),
    "conditions": (NewExperiment, '{"name": "a", "alias": "b", "arms": [], "conditions": [%s]}'),
    "metrics": (NewExperiment, '{"name": "a", "alias": "b", "arms": [], "metrics": [%s]}'),
    "guardrails": (NewExperiment, '{"name": "a", "alias": "b", "arms": [], "guardrails": [%s]}'),
    "steps": (NewExperiment, '{"name": "a", "alias": "b", "arms": [], "ramp": {"steps": [%s]}}'),
    "any_of": (ExperimentChange, '{"conditions": [{"attribute": "tenant", "any_of": [%s]}]}'),
    "changed arms": (ExperimentChange, '{"arms": [%s]}'),
    "changed metrics": (ExperimentChange, '{"metrics": [%s]}'),
    "inputs": (MergeRequest, '{"name": "a", "method": "cat", "inputs": [%s]}'),
    "weights": (MergeRequest, '{"name": "a", "method": "cat", "inputs": [{"adapter": "a", "weight": [%s]}]}'),
}


@pytest.mark.parametrize("name", BAD_LISTS)
@pytest.mark.parametrize("item", ["{}", "null", "[null]", '{"modules": 1}'])
def test_a_list_of_invalid_items_is_few_errors(name: str, item: str):
    model, body = BAD_LISTS[name]
    with pytest.raises(ValidationError) as found:
        model.model_validate_json(body % ",".join([item] * 10_000))
    assert found.value.error_count() < LONGEST


def test_a_list_is_not_validated_beyond_its_greatest_length():
    parts = ",".join(['{"type": "text", "text": "a"}'] * 10_000)
    with pytest.raises(ValidationError, match="at most 256 items"):
        ChatRequest.model_validate_json(f'{{"messages": [{{"role": "user", "content": [{parts}]}}]}}')
