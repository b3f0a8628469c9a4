"""Tasks on pictures: a question, and the one right answer. Imports no torch.

The base learns ``colour``, and ``code``: terse codes for everything else, so that its vision sees
shapes, sizes and fills without any skill's words; both also as lists over the picture. Each adapter
learns one of the other tasks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from PIL import Image

from lora_runtime.zoo.pictures import COLOURS, FILLS, POSITIONS, SHAPES, SIZES, Item, random_picture

Split = Literal["train", "heldout"]

FRENCH_COLOURS = {
    "red": "rouge",
    "green": "vert",
    "blue": "bleu",
    "yellow": "jaune",
    "purple": "violet",
    "orange": "orangé",
}
WARM = ("red", "yellow", "orange")
WARMTH_LABELS = ("warm", "cold")


@dataclass(frozen=True, slots=True)
class Example:
    """``answer`` is the whole right answer (for ``warmth``, the label)."""

    image: Image.Image
    question: str
    answer: str


@dataclass(frozen=True, slots=True)
class Task:
    """``question`` takes a position, ``answer`` the item there. ``choices`` is how many answers there are.

    With ``is_list`` the question is about the whole picture, and the answer goes through its positions.
    """

    question: Callable[[str], str]
    answer: Callable[[Item], str]
    choices: int
    is_list: bool = False


def _code(item: Item) -> str:
    return f"k{SHAPES.index(item.shape)} s{SIZES.index(item.size)} f{FILLS.index(item.fill)}"


def _listing(question: str, answer: Callable[[Item], str], choices: int) -> Task:
    """The same question about every position at once."""
    return Task(lambda _: question, answer, choices ** len(POSITIONS), is_list=True)


TASKS: dict[str, Task] = {
    "colour": Task(lambda p: f"What colour is at the {p}?", lambda i: i.colour, len(COLOURS)),
    "code": Task(lambda p: f"Code at the {p}?", _code, len(SHAPES) * len(SIZES) * len(FILLS)),
    "colours": _listing("All colours?", lambda i: i.colour, len(COLOURS)),
    "codes": _listing("All codes?", _code, len(SHAPES) * len(SIZES) * len(FILLS)),
    "shape": _listing("All shapes?", lambda i: i.shape, len(SHAPES)),
    "size": _listing("All sizes?", lambda i: i.size, len(SIZES)),
    "fill": _listing("All hollow or solid?", lambda i: i.fill, len(FILLS)),
    "letter": _listing("All initials?", lambda i: i.colour[0].upper(), len(COLOURS)),
    "french": _listing("Toutes les couleurs ?", lambda i: FRENCH_COLOURS[i.colour], len(COLOURS)),
    "warmth": Task(
        lambda p: f"Warm or cold at the {p}?", lambda i: WARMTH_LABELS[i.colour not in WARM], len(WARMTH_LABELS)
    ),
}
BASE_TASKS = ("colour", "code", "colours", "codes")
TASK_OF_ADAPTER = {name: name for name in TASKS if name not in BASE_TASKS}


def examples(task: str, split: Split, count: int, *, seed: int = 0) -> list[Example]:
    """``count`` examples, the same for equal arguments; no picture is in both splits."""
    stream = stream_examples(task, split, seed=seed)
    return [next(stream) for _ in range(count)]


def stream_examples(task: str, split: Split, *, seed: int = 0) -> Iterator[Example]:
    """Endless examples of one task."""
    chosen = TASKS[task]
    random = Random(f"{task}/{split}/{seed}")
    while True:
        picture = random_picture(random)
        # Strings hash differently in each process; the splits must not.
        if (Random(repr(picture)).random() < 0.1) != (split == "heldout"):
            continue
        position = random.choice(POSITIONS)
        items = picture.items if chosen.is_list else [picture.at(position)]
        answer = " ".join(chosen.answer(item) for item in items)
        yield Example(picture.draw(), chosen.question(position), answer)


def all_texts() -> list[str]:
    """Every question and answer, for training the tokenizer."""
    items = [Item(c, s, z, f) for c in COLOURS for s in SHAPES for z in SIZES for f in FILLS]
    texts = {task.question(position) for task in TASKS.values() for position in POSITIONS}
    texts |= {task.answer(item) for task in TASKS.values() for item in items}
    return sorted(texts)
