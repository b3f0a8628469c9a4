"""Reading evaluation sets: what a line may be, what is refused by its line, and how answers score."""

from __future__ import annotations

import base64
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lora_runtime.engine.protocol import ChatPrompt, ImagePart, Message, TextPart
from lora_runtime.errors import InvalidRequest
from lora_runtime.merge import examples as module
from lora_runtime.merge.examples import METRICS, Example, contains, exact, number, read_examples, words

PICTURE = b"\x89PNG not really"
URL = "data:image/png;base64," + base64.b64encode(PICTURE).decode()


def written(folder: Path, *lines: Any) -> Path:
    """Lines as they are where they are text or bytes, else as JSON."""
    (folder / "pictures").mkdir(exist_ok=True)
    (folder / "pictures" / "one.png").write_bytes(PICTURE)
    raw = [
        line if isinstance(line, bytes) else line.encode() if isinstance(line, str) else encoded(line) for line in lines
    ]
    path = folder / "examples.jsonl"
    path.write_bytes(b"\n".join(raw))
    return path


def encoded(line: Any) -> bytes:
    return json.dumps(line).encode()


def refused(path: Path, said: str, line: int | None = None) -> None:
    with pytest.raises(InvalidRequest, match=said) as caught:
        read_examples(path)
    assert caught.value.facts.get("line") == line


def test_many_spellings_are_one_form_inside(tmp_path: Path):
    path = written(
        tmp_path,
        "\ufeff" + json.dumps({"prompt": "Capital of France?", "answer": "Paris"}),
        "",
        {"prompt": "Shapes?", "image": "pictures/one.png", "answer": "a b", "metric": "words", "task": "shape"},
        {"prompt": "Both?", "image": [URL, "pictures/one.png"], "answer": "yes"},
        {
            "messages": [
                {"role": "system", "content": "Be brief."},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "And this?"},
                        {"type": "image_url", "image_url": {"url": "pictures/one.png"}},
                    ],
                },
            ],
            "answer": "7",
            "metric": "number",
        },
    )
    picture = ImagePart(data=PICTURE)

    def user(*parts: TextPart | ImagePart) -> Message:
        return Message(role="user", parts=parts)

    def prompt(*messages: Message) -> ChatPrompt:
        return ChatPrompt(messages=messages)

    assert read_examples(path, "contains") == (
        Example(prompt=prompt(user(TextPart(text="Capital of France?"))), answer="Paris", metric="contains"),
        Example(prompt=prompt(user(picture, TextPart(text="Shapes?"))), answer="a b", metric="words", task="shape"),
        Example(prompt=prompt(user(picture, picture, TextPart(text="Both?"))), answer="yes", metric="contains"),
        Example(
            prompt=prompt(
                Message(role="system", parts=(TextPart(text="Be brief."),)),
                user(TextPart(text="And this?"), picture),
            ),
            answer="7",
            metric="number",
        ),
    )
    assert read_examples(path)[0].metric == "exact"


GOOD = {"prompt": "?", "answer": "!"}


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "no JSON object"),
        ("[" * 100_000, "no JSON object|valid dictionary"),
        ("3", "valid dictionary"),
        (b'{"prompt": "\xff", "answer": "a"}', "not UTF-8"),
        ({"prompt": "?"}, "answer"),
        ({"prompt": "?", "answer": ""}, "answer"),
        ({"prompt": "?", "answer": "  "}, "'answer' is empty"),
        ({"prompt": "?", "answer": 3}, "answer"),
        ({"answer": "a"}, "either 'prompt' or 'messages'"),
        ({"prompt": "?", "messages": [{"role": "user", "content": "?"}], "answer": "a"}, "either"),
        ({"messages": [], "answer": "a"}, "messages"),
        ({"messages": [{"role": "assistant", "content": "?"}], "answer": "a"}, "must be the user's"),
        ({"messages": [{"role": "tool", "content": "?"}], "answer": "a"}, "role"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}], "answer": "a"}, "content"),
        ({**GOOD, "metrics": "exact"}, "metrics"),
        ({**GOOD, "metric": "bleu"}, "metric"),
        ({**GOOD, "metric": "number"}, "no number"),
        ({**GOOD, "task": "x" * 200}, "task"),
        ({"prompt": "\ud800", "answer": "a"}, "surrogate"),
        ({**GOOD, "image": "pictures/two.png"}, "cannot be read"),
        ({**GOOD, "image": "pictures"}, "is no file"),
        ({**GOOD, "image": "pipe"}, "is no file"),
        ({**GOOD, "image": "empty.png"}, "is empty"),
        ({**GOOD, "image": "../secret.png"}, "inside the file's folder"),
        ({**GOOD, "image": "pictures/../../secret.png"}, "inside the file's folder"),
        ({**GOOD, "image": "/etc/passwd"}, "inside the file's folder"),
        ({**GOOD, "image": "..\\secret.png"}, "inside the file's folder"),
        ({**GOOD, "image": "a\0b"}, "inside the file's folder"),
        ({**GOOD, "image": ""}, "inside the file's folder"),
        ({**GOOD, "image": "x" * 5000}, "cannot be read"),
        ({**GOOD, "image": "link.png"}, "leads out"),
        ({**GOOD, "image": "linked/secret.png"}, "leads out"),
        ({**GOOD, "image": "loop.png"}, "cannot be read"),
        ({**GOOD, "image": "https://example.org/a.png"}, "nothing is fetched"),
        ({**GOOD, "image": "file:///etc/passwd"}, "nothing is fetched"),
        ({**GOOD, "image": "data:text/html,hi"}, "data: URL"),
        ({**GOOD, "image": "data:image/png;base64,***"}, "base64 is damaged"),
        ({**GOOD, "image": "data:image/png;base64,"}, "is empty"),
        ({**GOOD, "image": ["pictures/one.png"] * 17}, "more than 16 images"),
        (dict(GOOD, prompt="the first"), "asks the same as line 1"),
    ],
)
def test_what_is_wrong_is_said_by_its_line(tmp_path: Path, line: Any, said: str):
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "secret.png").write_bytes(b"secret")
    folder = tmp_path / "inside"
    folder.mkdir()
    (folder / "link.png").symlink_to(tmp_path / "outside" / "secret.png")
    (folder / "linked").symlink_to(tmp_path / "outside")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "empty.png").touch()
    os.mkfifo(folder / "pipe")
    refused(written(folder, {"prompt": "the first", "answer": "1"}, "", line), said, 3)


def test_an_answer_that_differs_is_no_other_question(tmp_path: Path):
    refused(written(tmp_path, GOOD, {**GOOD, "answer": "?"}), "asks the same as line 1", 2)


def test_a_link_inside_the_folder_is_followed(tmp_path: Path):
    path = written(tmp_path, {**GOOD, "image": "again.png"})
    (tmp_path / "again.png").symlink_to(tmp_path / "pictures" / "one.png")
    assert read_examples(path)[0].prompt.messages[0].parts[0] == ImagePart(data=PICTURE)


def test_sizes_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = written(tmp_path, {**GOOD, "image": "pictures/one.png"}, {"prompt": "2", "answer": "2", "image": URL})
    assert len(read_examples(path)) == 2
    for name, value, said, line in (
        ("MAX_IMAGES_BYTES", 2 * len(PICTURE) - 1, "together", 2),
        ("MAX_IMAGE_BYTES", len(PICTURE) - 1, "more than 14 bytes", 1),
        ("MAX_EXAMPLES", 1, "more than 1 examples", None),
        ("MAX_FILE_BYTES", path.stat().st_size - 1, "bytes", None),
    ):
        with monkeypatch.context() as patched:
            patched.setattr(module, name, value)
            refused(path, said, line)
    only_url = written(tmp_path, {**GOOD, "image": "data:image/png;base64," + "A" * 400})
    monkeypatch.setattr(module, "MAX_IMAGE_BYTES", 100)
    refused(only_url, "more than 100 bytes", 1)


def test_the_file_itself(tmp_path: Path):
    refused(tmp_path / "none.jsonl", "cannot be read: FileNotFoundError")
    refused(tmp_path, "is no file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "is no file")
    refused(written(tmp_path, "", "  "), "empty", 1)


def test_examples_are_known_by_what_they_ask(tmp_path: Path):
    first, second, third = read_examples(
        written(tmp_path, GOOD, {**GOOD, "image": URL}, {"prompt": "??", "answer": "!", "task": "x"})
    )
    assert len({first.digest, second.digest, third.digest}) == 3
    (corrected,) = read_examples(written(tmp_path, {**GOOD, "answer": "corrected", "task": "other"}))
    assert corrected.digest == first.digest


@pytest.mark.parametrize(
    ("metric", "said", "wanted", "score"),
    [
        (exact, " Red\n Square", "red square", 1),
        (exact, "e\u0301te\u0301", "\u00e9t\u00e9", 1),
        (exact, "red square.", "red square", 0),
        (contains, "It is a RED  square.", "red square", 1),
        (contains, "redder squares", "red square", 0),
        (words, "the red square", "red square", 0.8),
        (words, "square, red!", "red square", 1),
        (words, "red red", "red", 2 / 3),
        (words, "blue", "red", 0),
        (words, "", "red", 0),
        (words, "!", "?", 1),
        (number, "It is 42.", "42", 1),
        (number, "first 3, then 1,234.50", "1234.5", 1),
        (number, "1e3 in all", "1000", 1),
        (number, "-7", "7", 0),
        (number, "pages 5-7", "7", 1),
        (number, "3/4", "0.75", 0),
        (number, ".5", "0.5", 1),
        (number, "1.0000001", "1", 1),
        (number, "none", "1", 0),
        (number, "9" * 5000, "1", 0),
    ],
)
def test_metrics(metric: Any, said: str, wanted: str, score: float):
    assert metric(said, wanted) == pytest.approx(score)
    assert METRICS[metric.__name__] is metric


@given(st.text(), st.text(min_size=1))
def test_scores_are_shares_and_the_answer_itself_is_right(said: str, wanted: str):
    for name, metric in METRICS.items():
        assert 0 <= metric(said, wanted) <= 1
        if name != "number":
            assert metric(wanted, wanted) == 1


@given(st.lists(st.sampled_from("abc"), max_size=6), st.lists(st.sampled_from("abc"), max_size=6))
def test_words_is_squads_f1(said: list[str], wanted: list[str]):
    """Precision and recall of a bag of words, as SQuAD's script has them."""
    left, common = list(wanted), 0
    for word in said:
        if word in left:
            left.remove(word)
            common += 1
    if not said or not wanted:
        want = float(said == wanted)
    elif not common:
        want = 0.0
    else:
        precision, recall = common / len(said), common / len(wanted)
        want = 2 * precision * recall / (precision + recall)
    assert words(" ".join(said), " ".join(wanted)) == pytest.approx(want)
