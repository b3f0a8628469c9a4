"""What a soak asks and registers: questions, targets, and adapters whose answers are known beforehand."""

from __future__ import annotations

import base64
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from lora_runtime.folder import CONFIG_NAME, fingerprint
from lora_runtime.zoo.paths import ADAPTERS, BASE_NAME
from lora_runtime.zoo.tasks import examples

CONTENTS = ("shape", "french", "size", "letter")
"""Adapters whose copies are registered; their answers differ from each other's and from the base's."""
COMBINATIONS = ("shape:1+french:1", "shape:0.7+letter:0.3", "french:0.5", "size:1+fill:-0.5")
TARGETS = (BASE_NAME, *CONTENTS, "fill", *COMBINATIONS)
MAX_TOKENS = 14
MARGIN = 0.05
"""Nats between the likeliest token and the next. Batches change log-probabilities by less than a hundredth of that."""


@dataclass(frozen=True, slots=True)
class Question:
    """A chat with one user message, with a picture or without."""

    name: str
    messages: list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Copy:
    """A copy of a demo adapter: content of its own for the registry (``version``), with the original's answers."""

    content: str
    folder: Path
    version: str


class Expected:
    """The right answer of each target to each question that it answers with a clear margin."""

    def __init__(self, answers: dict[tuple[str, str], str]) -> None:
        self.answers = answers

    def of(self, target: str, question: Question) -> str | None:
        """None where the margin is too small to compare anything with."""
        return self.answers.get((target, question.name))

    def clear(self, targets: Sequence[str], questions: Sequence[Question]) -> list[Question]:
        """Those that all of ``targets`` answer with a clear margin."""
        return [q for q in questions if all((target, q.name) in self.answers for target in targets)]

    def alike(self, questions: Sequence[Question]) -> list[tuple[str, str]]:
        """Pairs of targets that no question tells apart."""

        def differ(one: str, other: str) -> bool:
            return any(self.of(one, q) != self.of(other, q) for q in self.clear((one, other), questions))

        return [pair for pair in combinations(TARGETS, 2) if not differ(*pair)]


def questions(per_task: int) -> list[Question]:
    """Questions about ``per_task`` pictures of each task, and some without a picture."""
    found = []
    for task in ("colour", "codes", "shape", "size", "letter", "french", "fill"):
        for number, example in enumerate(examples(task, "heldout", per_task)):
            text = {"type": "text", "text": example.question}
            image = {"type": "image_url", "image_url": {"url": _data_uri(example.image)}}
            found.append(Question(f"{task}-{number}", [{"role": "user", "content": [image, text]}]))
    for number, words in enumerate(("All shapes?", "Toutes les couleurs ?", "Code at the top left?", "All initials?")):
        found.append(Question(f"text-{number}", [{"role": "user", "content": words}]))
    return found


def chat(model: str, question: Question, **more: Any) -> dict[str, Any]:
    """A greedy request for a chat completion."""
    return {"model": model, "messages": question.messages, "temperature": 0, "max_tokens": MAX_TOKENS, **more}


def measure(url: str, asked: Sequence[Question], targets: Sequence[str] = TARGETS) -> Expected:
    """Ask every question of every target, alone, and keep the answers whose every token has the margin."""
    answers = {}
    with httpx.Client(base_url=url, timeout=60) as http:
        for target in targets:
            for question in asked:
                body = chat(target, question, logprobs=True, top_logprobs=2)
                response = http.post("/v1/chat/completions", json=body).raise_for_status()
                (choice,) = response.json()["choices"]
                if _margin(choice["logprobs"]["content"]) >= MARGIN:
                    answers[target, question.name] = choice["message"]["content"]
    return Expected(answers)


def copies(root: Path, per_content: int) -> list[Copy]:
    """``per_content`` copies of each of CONTENTS in folders below ``root``."""
    found = []
    for content in CONTENTS:
        for number in range(per_content):
            folder = root / f"{content}-{number}"
            shutil.copytree(ADAPTERS[content], folder)
            config = json.loads((folder / CONFIG_NAME).read_text())
            # An option that decides nothing of what the adapter computes, and part of its fingerprint.
            (folder / CONFIG_NAME).write_text(json.dumps({**config, "revision": f"soak-{number}"}))
            found.append(Copy(content, folder, fingerprint(folder)))
    return found


def _margin(tokens: list[dict[str, Any]]) -> float:
    gaps = []
    for token in tokens:
        first, second = sorted((top["logprob"] for top in token["top_logprobs"]), reverse=True)
        gaps.append(first - second)
    return min(gaps, default=0.0)


def _data_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
