"""Text from tokens: nothing lost, nothing shown too early, stop strings never shown."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_runtime.engine.text import TextStream, TokenText
from lora_runtime.zoo.base import make_tokenizer

TOKENIZER = make_tokenizer()
BACKEND = TOKENIZER.backend_tokenizer


def encode(text: str) -> list[int]:
    return TOKENIZER.encode(text, add_special_tokens=False, split_special_tokens=True)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=40))
def test_pieces_add_up_to_the_text(text):
    stream = TextStream(BACKEND, ())
    assert "".join(stream.push(token) for token in encode(text)) + stream.flush() == text


@settings(max_examples=150, deadline=None)
@given(st.text("abc é", max_size=30), st.lists(st.text("abcé", min_size=1, max_size=4), min_size=1, max_size=3))
def test_text_ends_before_the_first_stop_string(text, stops):
    stream, shown = TextStream(BACKEND, tuple(stops)), ""
    for token in encode(text):
        shown += stream.push(token)
        assert not any(stop in shown for stop in stops)
        if stream.stopped:
            break
    shown += stream.flush()
    ends = [text.find(stop) for stop in stops if stop in text]
    assert stream.stopped == bool(ends)
    if ends:
        assert text.startswith(shown)
        assert not any(stop in shown for stop in stops)
    else:
        assert shown == text


def test_a_possible_stop_is_held_back_and_released():
    stream = TextStream(BACKEND, ("abX",))
    shown = [stream.push(token) for token in encode("zab")]
    assert "".join(shown) == "z"
    assert stream.push(encode("c")[0]) == "abc"


@pytest.mark.parametrize("text", ["red", " rouge", "é", "日本", "\n"])
def test_bytes_of_tokens_add_up(text):
    texts = TokenText(TOKENIZER)
    assert b"".join(texts.bytes_of(token) for token in encode(text)) == text.encode()


def test_bytes_of_odd_tokens():
    texts = TokenText(TOKENIZER)
    assert texts.bytes_of(TOKENIZER.convert_tokens_to_ids("<|im_end|>")) == b"<|im_end|>"
    assert texts.bytes_of(10**6) == b""
