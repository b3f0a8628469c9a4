"""The one training loop: cross-entropy on the answers, AdamW, one learning-rate cycle, bfloat16 where it is safe."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

import torch
from torch import Tensor, nn

from lora_runtime.zoo.batches import IGNORED, Batcher
from lora_runtime.zoo.tasks import WARMTH_LABELS, Example, stream_examples

Report = Callable[[str, int, int], None]
"""(stage, steps done, steps in all)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """How long and how fast. ``mix`` gives each task its share of the ``batch_size`` examples.

    ``silent``: shares of the tasks on which an adapter must leave the base as it is, ``num_silent`` of a
    batch's examples.
    Deltas that are quiet on each other's questions are what makes a sum of skills keep both.
    """

    steps: int
    batch_size: int
    learning_rate: float
    mix: Mapping[str, float]
    silent: Mapping[str, float] = field(default_factory=dict)
    num_silent: int = 0


def train(
    model: nn.Module,
    batcher: Batcher,
    schedule: Schedule,
    *,
    stage: str,
    seed: int,
    report: Report,
    labels: bool = False,
    before_step: Callable[[int], None] = lambda step: None,
) -> None:
    """Train every parameter of ``model`` that wants gradients. ``labels``: a classifier on label indices.

    ``before_step`` gets each step's number and may change what is frozen.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=0.05, betas=(0.9, 0.98))
    cycle = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, schedule.learning_rate, total_steps=schedule.steps, pct_start=0.1
    )
    examples = _mixed(schedule.mix, seed)
    others = _mixed(schedule.silent, seed + 1)
    model.train()
    for step in range(schedule.steps):
        before_step(step)
        drawn = [next(examples) for _ in range(schedule.batch_size - schedule.num_silent)]
        silent = [next(others) for _ in range(schedule.num_silent)]
        with torch.autocast("cpu", torch.bfloat16):
            loss = _label_loss(model, batcher, drawn) if labels else _answer_loss(model, batcher, drawn, silent)
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


def _answer_loss(model: Any, batcher: Batcher, examples: list[Example], silent: list[Example]) -> Tensor:
    """Cross-entropy of the answers, plus KL(base ‖ adapted) on the silent ones', each in nats a token."""
    batch = batcher.batch([*examples, *silent])
    logits, targets = model(**batch.inputs).logits[:, :-1].float(), batch.labels[:, 1:]
    loss = nn.functional.cross_entropy(
        logits[: len(examples)].flatten(0, 1), targets[: len(examples)].flatten(), ignore_index=IGNORED
    )
    if not silent:
        return loss
    alone = batcher.batch(silent)
    with torch.no_grad(), model.disable_adapter():
        wanted = model(**alone.inputs).logits[:, :-1][alone.labels[:, 1:] != IGNORED].float().log_softmax(-1)
    found = logits[len(examples) :][targets[len(examples) :] != IGNORED].log_softmax(-1)
    return loss + nn.functional.kl_div(found, wanted, log_target=True, reduction="batchmean")


def _label_loss(model: nn.Module, batcher: Batcher, examples: list[Example]) -> Tensor:
    inputs: dict[str, Any] = batcher.batch(examples, with_answers=False).inputs
    wanted = torch.tensor([WARMTH_LABELS.index(example.answer) for example in examples])
    return nn.functional.cross_entropy(model(**inputs).logits.float(), wanted)
