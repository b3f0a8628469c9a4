"""Questions with their right answers, by which merges are compared: read from a JSONL file, and how answers score.

The file is somebody's upload: its size and shape are bounded, and the paths in it do not leave its folder. Imports no
torch.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import math
import re
import stat
import string
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from lora_runtime.data_urls import decode_data_url, is_data_url
from lora_runtime.engine.protocol import ChatPrompt, ImagePart, Message, Role, TextPart
from lora_runtime.errors import InvalidImage, InvalidRequest

MetricName = Literal["exact", "contains", "words", "number"]
MAX_FILE_BYTES = 64 << 20
MAX_EXAMPLES = 10_000
MAX_IMAGE_BYTES = 16 << 20
MAX_IMAGES_BYTES = 256 << 20
"""Of all examples together."""
MAX_IMAGES = 16
"""Of one example."""
_NUMBER = re.compile(r"(?:(?<!\w)[-+])?(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3}(?!\w))?")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


@dataclass(frozen=True, slots=True, kw_only=True)
class Example:
    """A prompt and the answer that it should have, scored by ``metric``. ``task``: examples of one are averaged
    before tasks are, so that a task counts the same however many examples it has."""

    prompt: ChatPrompt
    answer: str
    metric: MetricName = "exact"
    task: str = ""

    @property
    def digest(self) -> bytes:
        """Of what is asked, and not of the answer: a corrected answer is the same example."""
        digest = hashlib.sha256()
        for message in self.prompt.messages:
            digest.update(f"{message.role}/{len(message.parts)}/".encode())
            for part in message.parts:
                data = part.data if isinstance(part, ImagePart) else part.text.encode()
                digest.update(f"{type(part).__name__}/{len(data)}/".encode() + data)
        return digest.digest()

    def score(self, said: str) -> float:
        """How right ``said`` is, from 0 to 1."""
        return METRICS[self.metric](said, self.answer)


def exact(said: str, wanted: str) -> float:
    """1 where both are the same but for case, spaces and how letters are composed (Unicode's NFC)."""
    return float(_plain(said) == _plain(wanted))


def contains(said: str, wanted: str) -> float:
    """1 where ``wanted`` is somewhere in ``said``, as :func:`exact` compares."""
    return float(_plain(wanted) in _plain(said))


def words(said: str, wanted: str) -> float:
    """F1 over words, each as often as it occurs: 2·|said ∩ wanted| / (|said| + |wanted|), without case and ASCII
    punctuation (SQuAD: Rajpurkar et al. 2016, arXiv 1606.05250, §6.1). SQuAD's script also drops "a", "an" and "the",
    which is no rule for other languages."""
    got, right = (Counter(_plain(text).translate(_PUNCTUATION).split()) for text in (said, wanted))
    if not got or not right:
        return float(got == right)
    return 2 * (got & right).total() / (got.total() + right.total())


def number(said: str, wanted: str) -> float:
    """1 where the last number of ``said`` is that of ``wanted``, but for rounding (10⁻⁶ of it). "1,234.5" and "1e3" are
    numbers, "3/4" are two."""
    got, right = _last_number(said), _last_number(wanted)
    return float(got is not None and right is not None and math.isclose(got, right, rel_tol=1e-6, abs_tol=1e-12))


METRICS: Mapping[MetricName, Callable[[str, str], float]] = MappingProxyType(
    {"exact": exact, "contains": contains, "words": words, "number": number}
)


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Text(_Part):
    type: Literal["text"]
    text: str


class _Url(_Part):
    url: str


class _Image(_Part):
    type: Literal["image_url"]
    image_url: _Url


class _Message(_Part):
    role: Role
    content: str | list[Annotated[_Text | _Image, Field(discriminator="type")]]


class _Line(_Part):
    prompt: str | None = None
    messages: list[_Message] | None = Field(default=None, min_length=1, max_length=256)
    image: str | list[str] | None = None
    answer: str = Field(min_length=1)
    metric: MetricName | None = None
    task: str = Field(default="", max_length=128)

    @model_validator(mode="after")
    def _asks_once(self) -> _Line:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("give either 'prompt' or 'messages'")
        if self.messages is not None and self.messages[-1].role != "user":
            raise ValueError("the last of 'messages' must be the user's")
        if not self.answer.strip():
            raise ValueError("'answer' is empty")
        return self


def read_examples(path: Path, metric: MetricName = "exact") -> tuple[Example, ...]:
    """The examples of a JSONL file, with ``metric`` where a line names none. Blocks on the disk.

    A line: ``{"prompt": str, "answer": str}``, or ``messages`` as OpenAI has them in place of ``prompt``. ``image`` is
    one image or a list of them, each a path from the file's folder or a ``data:`` URL, put before the last message's
    text. ``metric`` and ``task`` are optional.

    Raises InvalidRequest, with the line's number, for what is not such a line, is larger than may be read, leads out
    of the folder, or asks what an earlier line asked (which would be on both sides of a split).
    """
    images = _Images(path.parent)
    found: dict[bytes, int] = {}
    examples: list[Example] = []
    for line_number, text in _lines(path):
        try:
            example = _example(text, metric, images)
        except _Wrong as wrong:
            raise InvalidRequest(f"Line {line_number} of the examples: {wrong}", line=line_number) from wrong
        earlier = found.setdefault(example.digest, line_number)
        if earlier != line_number:
            said = f"Line {line_number} of the examples asks the same as line {earlier}. Leave one of them out."
            raise InvalidRequest(said, line=line_number)
        examples.append(example)
    if not examples:
        raise InvalidRequest("The examples' file is empty; give one JSON object a line.", line=1)
    return tuple(examples)


class _Wrong(Exception):
    """What is wrong with a line, and what to do."""


class _Images:
    """Reads images for one file's lines, and counts how much they are."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.resolve()
        self._left_bytes = MAX_IMAGES_BYTES

    def read(self, where: str) -> ImagePart:
        data = _decoded(where) if is_data_url(where) else self._from_disk(where)
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            raise _Wrong(f"with it, the images are more than {MAX_IMAGES_BYTES} bytes together. Use fewer examples.")
        return ImagePart(data=data)

    def _from_disk(self, where: str) -> bytes:
        shown = repr(where[:100])
        if "://" in where:
            raise _Wrong(f"{shown} is an address, and nothing is fetched. Put the image beside the file.")
        if not where or "\0" in where or "\\" in where or Path(where).is_absolute() or ".." in Path(where).parts:
            raise _Wrong(f"the image {shown} is no path inside the file's folder. Put it there.")
        try:
            file = (self._folder / where).resolve(strict=True)
            if not file.is_relative_to(self._folder):
                raise _Wrong(f"the image {shown} is a link that leads out of the file's folder. Put the file there.")
            # Asked first: a pipe would wait for ever.
            if not stat.S_ISREG(file.stat().st_mode):
                raise _Wrong(f"the image {shown} is no file.")
            with file.open("rb") as opened:
                data = opened.read(MAX_IMAGE_BYTES + 1)
        except (OSError, RuntimeError, ValueError) as error:
            raise _Wrong(f"the image {shown} cannot be read: {type(error).__name__}.") from error
        return _bounded(data, shown)


def _example(text: str, metric: MetricName, images: _Images) -> Example:
    try:
        line = _Line.model_validate(json.loads(text))
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(str(step) for step in first["loc"])
        raise _Wrong(f"{where}: {first['msg']}." if where else f"{first['msg']}.") from error
    except (ValueError, RecursionError) as error:
        raise _Wrong("it is no JSON object. Write one object a line.") from error
    messages = _messages(line, images)
    chosen = line.metric or metric
    if chosen == "number" and _last_number(line.answer) is None:
        raise _Wrong(f"the answer {line.answer[:50]!r} has no number in it. Give another 'metric'.")
    if sum(isinstance(part, ImagePart) for message in messages for part in message.parts) > MAX_IMAGES:
        raise _Wrong(f"it has more than {MAX_IMAGES} images.")
    texts = [part.text for message in messages for part in message.parts if isinstance(part, TextPart)]
    if any("\ud800" <= letter <= "\udfff" for part in (*texts, line.answer, line.task) for letter in part):
        raise _Wrong("half of a surrogate pair is no text. Write the file as UTF-8.")
    return Example(prompt=ChatPrompt(messages=messages), answer=line.answer, metric=chosen, task=line.task)


def _messages(line: _Line, images: _Images) -> tuple[Message, ...]:
    beside = [line.image] if isinstance(line.image, str) else line.image or []
    pictures = tuple(images.read(where) for where in beside[: MAX_IMAGES + 1])
    if line.messages is None:
        return (Message(role="user", parts=(*pictures, TextPart(text=line.prompt or ""))),)
    read = [Message(role=message.role, parts=_parts(message.content, images)) for message in line.messages]
    return (*read[:-1], Message(role="user", parts=(*pictures, *read[-1].parts)))


def _parts(content: str | list[_Text | _Image], images: _Images) -> tuple[TextPart | ImagePart, ...]:
    if isinstance(content, str):
        return (TextPart(text=content),)
    return tuple(
        TextPart(text=part.text) if isinstance(part, _Text) else images.read(part.image_url.url) for part in content
    )


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines that are not blank, counted from 1."""
    try:
        # Asked first: opening a pipe would wait for ever.
        if not stat.S_ISREG(path.stat().st_mode):
            raise InvalidRequest(f"The examples' file '{path.name}' is no file.")
        with path.open("rb") as opened:
            content = opened.read(MAX_FILE_BYTES + 1)
    except (OSError, ValueError) as error:
        said = f"The examples' file '{path.name}' cannot be read: {type(error).__name__}."
        raise InvalidRequest(said) from error
    if len(content) > MAX_FILE_BYTES:
        raise InvalidRequest(f"The examples' file has more than {MAX_FILE_BYTES} bytes. Use fewer examples.")
    lines = content.removeprefix(codecs.BOM_UTF8).split(b"\n")
    if sum(1 for raw in lines if raw.strip()) > MAX_EXAMPLES:
        raise InvalidRequest(f"There are more than {MAX_EXAMPLES} examples. Use fewer.")
    for line_number, raw in enumerate(lines, 1):
        try:
            text = raw.decode().strip()
        except UnicodeDecodeError as error:
            said = f"Line {line_number} of the examples is not UTF-8. Write the file as UTF-8."
            raise InvalidRequest(said, line=line_number) from error
        if text:
            yield line_number, text


def _decoded(url: str) -> bytes:
    try:
        data = decode_data_url(url, "an image")
    except InvalidImage as error:
        raise _Wrong(error.message) from error
    return _bounded(data, "in the data: URL")


def _bounded(data: bytes, shown: str) -> bytes:
    if not data:
        raise _Wrong(f"the image {shown} is empty.")
    if len(data) > MAX_IMAGE_BYTES:
        raise _Wrong(f"the image {shown} has more than {MAX_IMAGE_BYTES} bytes. Make it smaller.")
    return data


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).casefold().split())


def _last_number(text: str) -> float | None:
    """The last number that is written with digits. A hyphen between two is no sign."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "")) if found else None
