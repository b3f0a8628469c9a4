"""A text is refused by its length only where no tokenizer could make it fit; and long texts let other threads run."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, normalizers

from lora_runtime.engine.images import ImageProcessor
from lora_runtime.engine.prompt_length import EXPANSION, PromptLength
from lora_runtime.engine.prompts import PromptProcessor
from lora_runtime.engine.protocol import ChatPrompt, Message, Prompt, TextPart, TextPrompt, TokenPrompt
from lora_runtime.errors import ContextOverflow, InvalidRequest
from lora_runtime.zoo.paths import BASE

TOKENIZER = BASE / "tokenizer.json"


def plain() -> Tokenizer:
    return Tokenizer.from_file(str(TOKENIZER))


def normalizing() -> Tokenizer:
    """With NFC, as Qwen2-VL's own tokenizer has it."""
    found = plain()
    found.normalizer = normalizers.NFC()
    return found


TOKENIZERS = {"plain": plain(), "normalizing": normalizing()}
VOCABULARY = sorted(TOKENIZERS["plain"].get_vocab())
DECOMPOSED = ["\u1f82", "\uac01", "\u0390", "\u1e09", "\u212a", "\u2126", "\ufb2c", "\u0344"]
PIECES = st.one_of(
    st.text(max_size=40),
    st.sampled_from(VOCABULARY),
    st.sampled_from(DECOMPOSED).map(lambda char: unicodedata.normalize("NFD", char) * 20),
    st.sampled_from([" ", "\n", "a", "\u0301", "\U0001f600", " assistant"]).flatmap(
        lambda unit: st.integers(1, 60).map(lambda times: unit * times)
    ),
)
TEXTS = st.lists(PIECES, max_size=8).map("".join)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=400, deadline=None)
@given(text=TEXTS)
def test_a_text_whose_tokens_fit_is_never_refused(kind: str, text: str) -> None:
    backend = TOKENIZERS[kind]
    PromptLength(backend).check_text(text, len(backend.encode(text, add_special_tokens=False)), "prompt")


@pytest.mark.parametrize("special", [True, False])
def test_the_longest_tokens_fill_a_context_to_its_last_character(special: bool) -> None:
    backend = plain()
    backend.encode_special_tokens = not special
    length = PromptLength(backend)
    most = length.characters_per_token
    assert most == len("<|object_ref_start|>")
    text = "<|object_ref_start|>" * 50
    if special:
        assert len(backend.encode(text, add_special_tokens=False)) == 50
        length.check_text(text, 50, "prompt")
    with pytest.raises(ContextOverflow, match=r"1001 characters.*50 tokens hold at most 1000") as caught:
        length.check_text(text + "x", 50, "prompt")
    assert caught.value.facts["param"] == "prompt"


def test_composing_shortens_a_text_as_far_as_is_allowed_for_and_no_further() -> None:
    shortened = {
        char: len(unicodedata.normalize("NFD", char)) / len(unicodedata.normalize("NFC", char))
        for char in map(chr, range(sys.maxunicode + 1))
        if not "\ud800" <= char <= "\udfff"
    }
    assert max(shortened.values()) == EXPANSION


@pytest.mark.parametrize(
    ("what", "change"),
    [
        ("another kind of model", lambda d: d["model"].update(type="WordPiece")),
        ("a byte without a token", lambda d: d["model"]["vocab"].pop("a")),
        ("a normalizer that may strip", lambda d: d.update(normalizer={"type": "Strip"})),
        ("white space that a token takes along", lambda d: d["added_tokens"][0].update(rstrip=True)),
        ("a split that drops", lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed")),
    ],
)
def test_nothing_is_refused_where_tokens_may_take_any_number_of_characters(
    what: str, change: Callable[[dict[str, Any]], None]
) -> None:
    described = json.loads(TOKENIZER.read_text())
    change(described)

    class Described:
        def to_str(self) -> str:
            return json.dumps(described)

    length = PromptLength(Described())  # type: ignore[arg-type]
    assert length.characters_per_token is None, what
    length.check_text("x" * 1_000_000, 1, "prompt")


@pytest.fixture(scope="module")
def prompts() -> PromptProcessor:
    images = ImageProcessor(str(BASE), max_pixels=1 << 20)
    return PromptProcessor(str(BASE), images, max_images=2, rope_index=None)


def chat(*texts: str) -> ChatPrompt:
    return ChatPrompt(messages=(Message(role="user", parts=tuple(TextPart(text=text) for text in texts)),))


LONG = 4_000_000
TOO_LONG: dict[str, Prompt] = {
    "a text": TextPrompt(text="word " * (LONG // 5)),
    "a chat": chat("word " * (LONG // 5)),
    "a chat that spells special tokens": chat("<|im_start|> " * (LONG // 13)),
    "a chat in another script": chat("\u1f82" * LONG),
    "a chat of parts": chat(*["word " * (LONG // 50)] * 10),
    "ids": TokenPrompt(token_ids=(5,) * LONG),
}


@pytest.mark.parametrize("what", TOO_LONG)
def test_what_cannot_fit_is_refused_before_it_is_tokenized(
    prompts: PromptProcessor, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def tokenizes(*_: Any, **__: Any) -> Any:
        raise AssertionError("it was tokenized")

    class Untouched:
        encode = encode_batch = encode_batch_fast = tokenizes

    monkeypatch.setattr(prompts, "_plain", Untouched())
    monkeypatch.setattr(prompts, "_with_specials", Untouched())
    for refuses in (prompts.prepare, lambda *asked: asyncio.run(prompts.check(*asked))):
        with pytest.raises(ContextOverflow, match=r"2048 tokens|context holds 2048"):
            refuses(TOO_LONG[what], 2048)


@pytest.mark.parametrize("text", ["word " * 3000, "<|im_end|>" * 3000])
def test_what_could_fit_by_its_length_is_counted(prompts: PromptProcessor, text: str) -> None:
    for prompt in (chat(text), TextPrompt(text=text)):
        needed = len(prompts.prepare(prompt).ids)
        asyncio.run(prompts.check(prompt, needed))
        assert len(prompts.prepare(prompt, needed).ids) == needed
        with pytest.raises(ContextOverflow, match=f"context holds {needed - 1}"):
            prompts.prepare(prompt, needed - 1)


@pytest.mark.parametrize("prompt", [TextPrompt(text="a\ud800"), chat("a", "\udfff"), chat("<|im_end|>\ud800")])
def test_what_is_no_unicode_is_the_requests_fault(prompts: PromptProcessor, prompt: Prompt) -> None:
    with pytest.raises(InvalidRequest, match="surrogate"):
        prompts.prepare(prompt, 2048)


def test_what_a_template_leaves_out_is_not_counted(prompts: PromptProcessor, monkeypatch: pytest.MonkeyPatch) -> None:
    stripping = "{% for m in messages %}{% for c in m['content'] %}{{ c['text'] | trim }}{% endfor %}{% endfor %}"
    monkeypatch.setattr(prompts.tokenizer, "chat_template", stripping)
    prompt = chat(" " * 1_000_000 + "word")
    asyncio.run(prompts.check(prompt, 10))
    assert len(prompts.prepare(prompt, 10).ids) <= 4


def test_a_tokenizer_that_shortens_texts_is_not_obeyed(tmp_path: Path) -> None:
    for file in BASE.iterdir():
        (tmp_path / file.name).symlink_to(file)
    described = json.loads(TOKENIZER.read_text())
    described["truncation"] = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    images = ImageProcessor(str(tmp_path), max_pixels=1 << 20)
    found = PromptProcessor(str(tmp_path), images, max_images=2, rope_index=None)
    assert len(found.prepare(TextPrompt(text="word " * 100)).ids) > 100


@pytest.mark.parametrize("what", ["a text", "a chat", "a chat that spells special tokens"])
def test_other_threads_run_while_a_long_text_is_tokenized(prompts: PromptProcessor, what: str) -> None:
    """Without a bound, so that all of it is tokenized. In one hold of the lock, nothing ran in all that time."""
    ticks, stop = 0, threading.Event()

    def tick() -> None:
        nonlocal ticks
        while not stop.is_set():
            time.sleep(0.002)
            ticks += 1

    thread = threading.Thread(target=tick)
    thread.start()
    begun = time.monotonic()
    try:
        prompts._encode([(part.text, what != "a chat") for part in _parts(TOO_LONG[what])], sys.maxsize, "prompt")
    finally:
        took = time.monotonic() - begun
        stop.set()
        thread.join()
    assert ticks >= 10, f"{ticks} ticks in {took:.2f} s"


def _parts(prompt: Prompt) -> tuple[TextPart, ...]:
    if isinstance(prompt, TextPrompt):
        return (TextPart(text=prompt.text),)
    assert isinstance(prompt, ChatPrompt)
    return tuple(part for message in prompt.messages for part in message.parts if isinstance(part, TextPart))
