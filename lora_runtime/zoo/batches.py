"""Examples as padded tensors, rendered by the chat template that serving uses.

Shape legend: B examples, T tokens, P patches of all images.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_runtime.zoo.tasks import Example

IGNORED = -100


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """``inputs`` go to the model as they are; ``labels`` (B, T) hold the answers' tokens, all else ignored."""

    inputs: dict[str, Tensor]
    labels: Tensor


class Batcher:
    """Turns examples into batches with one tokenizer and image processor."""

    def __init__(self, tokenizer: Any, processor: Any) -> None:
        self.tokenizer = tokenizer
        self._processor = processor
        self._image_id = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self._prompts: dict[tuple[str, int], list[int]] = {}

    def batch(self, examples: Sequence[Example], *, with_answers: bool = True) -> Batch:
        """Right-padded with answers (training), left-padded without (asking)."""
        features = self._processor(images=[example.image for example in examples], return_tensors="pt")
        tokens = features["image_grid_thw"].prod(-1) // self._processor.merge_size**2
        prompts = [self._prompt(e.question, int(n)) for e, n in zip(examples, tokens, strict=True)]
        answers = [self._answer(e.answer) if with_answers else [] for e in examples]
        longest = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
        rows, labels, masks = [], [], []
        for prompt, answer in zip(prompts, answers, strict=True):
            padding = [self.tokenizer.pad_token_id] * (longest - len(prompt) - len(answer))
            before, after = ([], padding) if with_answers else (padding, [])
            rows.append([*before, *prompt, *answer, *after])
            masks.append([*[0] * len(before), *[1] * (len(prompt) + len(answer)), *[0] * len(after)])
            labels.append([*[IGNORED] * len(prompt), *answer, *[IGNORED] * len(after)] if with_answers else [])
        ids = torch.tensor(rows)
        inputs = {
            "input_ids": ids,
            "attention_mask": torch.tensor(masks),
            "mm_token_type_ids": (ids == self._image_id).int(),
            "pixel_values": features["pixel_values"],
            "image_grid_thw": features["image_grid_thw"],
        }
        return Batch(inputs, torch.tensor(labels))

    def _prompt(self, question: str, num_image_tokens: int) -> list[int]:
        key = question, num_image_tokens
        if key not in self._prompts:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            text = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
            )
            text = text.replace("<|image_pad|>", "<|image_pad|>" * num_image_tokens)
            self._prompts[key] = self.tokenizer.encode(text, add_special_tokens=False)
        return self._prompts[key]

    def _answer(self, answer: str) -> list[int]:
        return [*self.tokenizer.encode(answer, add_special_tokens=False), self.tokenizer.eos_token_id]
