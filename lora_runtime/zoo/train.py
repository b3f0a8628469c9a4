"""The one training loop: cross-entropy on the answers, AdamW, one learning-rate cycle."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from lora_runtime.zoo.batches import Batcher
from lora_runtime.zoo.tasks import WARMTH_LABELS, Example, stream_examples

Report = Callable[[str, int, int], None]
"""(stage, steps done, steps in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast. ``mix`` gives each task its share of the examples."""

    steps: int
    batch_size: int
    learning_rate: float
    mix: Mapping[str, float]


def train(
    model: nn.Module,
    batcher: Batcher,
    schedule: Schedule,
    *,
    stage: str,
    seed: int,
    report: Report,
    labels: bool = False,
) -> None:
    """Train every parameter of ``model`` that wants gradients. ``labels``: a classifier on label indices."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.steps, pct_start=0.1
    )
    examples = _mixed(schedule.mix, seed)
    model.train()
    for step in range(schedule.steps):
        drawn = [next(examples) for _ in range(schedule.batch_size)]
        loss = _label_loss(model, batcher, drawn) if labels else _answer_loss(model, batcher, drawn)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        cycle.step()
        optimizer.zero_grad()
        report(stage, step + 1, schedule.steps)
    model.eval()


def _mixed(mix: Mapping[str, float], seed: int) -> Iterator[Example]:
    random = Random(seed)
    streams = {task: stream_examples(task, "train", seed=seed) for task in mix}
    while True:
        yield next(streams[random.choices(list(mix), list(mix.values()))[0]])


def _answer_loss(model: nn.Module, batcher: Batcher, examples: list[Example]) -> Tensor:
    batch = batcher.batch(examples)
    loss: Tensor = model(**batch.inputs, labels=batch.labels).loss
    return loss


def _label_loss(model: nn.Module, batcher: Batcher, examples: list[Example]) -> Tensor:
    inputs: dict[str, Any] = batcher.batch(examples, with_answers=False).inputs
    wanted = torch.tensor([WARMTH_LABELS.index(example.answer) for example in examples])
    return nn.functional.cross_entropy(model(**inputs).logits, wanted)
