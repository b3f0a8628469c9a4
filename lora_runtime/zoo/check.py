"""How right the zoo is, on held-out pictures: transformers, PEFT and dense arithmetic, no engine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoTokenizer, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from lora_runtime.checkpoint import read_adapter
from lora_runtime.combine import combine
from lora_runtime.dense import add_into
from lora_runtime.layout import BaseLayout
from lora_runtime.zoo.batches import IGNORED, Batcher
from lora_runtime.zoo.build import CLASSIFIER
from lora_runtime.zoo.classifier import with_head
from lora_runtime.zoo.paths import COMBINATIONS
from lora_runtime.zoo.tasks import TASK_OF_ADAPTER, TASKS, WARMTH_LABELS, examples

NUM_EXAMPLES = 200
GOOD_BASE, GOOD_ADAPTER, GOOD_COMBINATION = 0.95, 0.90, 0.80


@dataclass(frozen=True, slots=True)
class AccuracyRow:
    """Share of whole answers that are right. ``base_accuracy`` is the bare base's on the same task."""

    model: str
    task: str
    accuracy: float
    chance: float
    base_accuracy: float | None
    is_good: bool


def check(zoo: Path, *, count: int = NUM_EXAMPLES) -> list[AccuracyRow]:
    """A row for the base, for each adapter on its skill, and for each combination on each of its skills."""
    batcher = Batcher(
        AutoTokenizer.from_pretrained(zoo / "base"), Qwen2VLImageProcessorPil.from_pretrained(zoo / "base")
    )
    base = _load(zoo)
    own = answers_right(base, batcher, "colour", count)
    rows = [AccuracyRow("base", "colour", own, 1 / TASKS["colour"].choices, None, own >= GOOD_BASE)]
    for name, task in TASK_OF_ADAPTER.items():
        chance = 1 / TASKS[task].choices
        if name == CLASSIFIER:
            right, before = _labels_right(zoo, batcher, task, count), None
        else:
            adapted = PeftModel.from_pretrained(_load(zoo), zoo / "adapters" / name).eval()
            right, before = answers_right(adapted, batcher, task, count), answers_right(base, batcher, task, count)
        is_good = right >= GOOD_ADAPTER and (before is None or before <= chance + 0.1)
        rows.append(AccuracyRow(name, task, right, chance, before, is_good))
    for label, shares in COMBINATIONS.items():
        combined = _combined(zoo, shares)
        for name in shares:
            task = TASK_OF_ADAPTER[name]
            right = answers_right(combined, batcher, task, count)
            rows.append(AccuracyRow(label, task, right, 1 / TASKS[task].choices, None, right >= GOOD_COMBINATION))
    return rows


def _load(zoo: Path) -> Any:
    return Qwen2VLForConditionalGeneration.from_pretrained(zoo / "base", dtype=torch.float32).eval()


def _combined(zoo: Path, shares: dict[str, float]) -> Any:
    model = _load(zoo)
    layout = BaseLayout.from_model(model)
    members = [(read_adapter(zoo / "adapters" / name, layout), weight) for name, weight in shares.items()]
    own = dict(model.named_parameters())
    add_into(model, combine(members, lambda leaf, parameter: own[f"{leaf}.{parameter}"].detach()))
    return model


@torch.no_grad()
def answers_right(model: Any, batcher: Batcher, task: str, count: int) -> float:
    """Share of answers whose every token, the end included, is the likeliest: greedy decoding's exact match."""
    batch = batcher.batch(examples(task, "heldout", count))
    predicted = model(**batch.inputs).logits[:, :-1].argmax(-1)
    wanted = batch.labels[:, 1:]
    return float(((predicted == wanted) | (wanted == IGNORED)).all(1).float().mean())


@torch.no_grad()
def _labels_right(zoo: Path, batcher: Batcher, task: str, count: int) -> float:
    model = PeftModel.from_pretrained(with_head(_load(zoo), WARMTH_LABELS), zoo / "adapters" / CLASSIFIER).eval()
    drawn = examples(task, "heldout", count)
    predicted = model(**batcher.batch(drawn, with_answers=False).inputs).logits.argmax(-1).tolist()
    return sum(WARMTH_LABELS[i] == e.answer for i, e in zip(predicted, drawn, strict=True)) / count
