"""What PEFT alone, and dense arithmetic, answer on the random world: the oracle of every engine."""

from __future__ import annotations

import torch

from lora_runtime.engine.images import ImageProcessor
from lora_runtime.engine.prompts import Prepared, PromptProcessor
from lora_runtime.engine.protocol import AdapterRef, Prompt
from tests.oracle.asking import NUM_TOKENS, Answer, Target
from tests.oracle.world import NAMES, World, chat, greedy, picture

PROMPTS = (
    chat("What colour is the shape?"),
    chat("Describe it", picture(1)),
    chat("Compare the two", picture(1), picture(2, 56, 84)),
)
COMBINATIONS: tuple[dict[str, float], ...] = (
    {"plain": 0.7, "rslora": 0.3},
    {"saved_merger": 1.0, "merger_lora": -0.5},
    {"saved_head": 0.6, "saved_vocabulary": 0.8, "saved_norms": 1.1},
    {"vocabulary_lora": 0.5, "saved_vocabulary": 0.5, "tokens": 0.5},
    {"tower": 0.4, "saved_block": -0.7, "own_biases": 1.5, "all_biases": 0.3},
    {"dora": 0.6, "loha": -0.4, "patterns": 0.8},
)

Answers = dict[Target, list[Answer]]
"""Answers to ``PROMPTS``, by target; the base's is the empty one."""


def prepare(world: World, prompt: Prompt) -> Prepared:
    images = ImageProcessor(str(world.base), max_pixels=1 << 20)
    model = world.load().model
    return PromptProcessor(str(world.base), images, max_images=4, rope_index=model.get_rope_index).prepare(prompt)


@torch.no_grad()
def oracle_answers(world: World) -> Answers:
    """Every answer, one model at a time."""
    prepared = [prepare(world, prompt) for prompt in PROMPTS]
    answers: Answers = {(): [greedy(world.load(), p, NUM_TOKENS) for p in prepared]}
    for name in NAMES:
        model = world.peft(name)
        answers[((name, 1.0),)] = [greedy(model, p, NUM_TOKENS) for p in prepared]
    for shares in COMBINATIONS:
        model = world.dense(shares)
        answers[tuple(shares.items())] = [greedy(model, p, NUM_TOKENS) for p in prepared]
    return answers


def refs_of(world: World, answers: Answers) -> dict[Target, tuple[AdapterRef, ...]]:
    """What a request names for each target."""
    return {target: tuple(world.ref(name, weight) for name, weight in target) for target in answers}
