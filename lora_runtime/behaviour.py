"""How far an adapter moves a base's answers, shown by running both on one probe of text around an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_runtime.dense import add_into
from lora_runtime.weights import AdapterWeights

NUM_TEXT = 24
GRID = (1, 8, 8)
"""Frames, rows and columns of patches of the probe's image."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behaviour:
    """What changes over the probe's positions. ``kl``: mean KL(base ‖ adapted) in nats. ``agreement``: share of
    positions whose likeliest token stays the same."""

    is_same: bool
    kl: float
    agreement: float


def behaviour(base_path: str, weights: AdapterWeights) -> Behaviour:
    """Run the base at ``base_path``, add ``weights`` densely in fp32, and run it again. Holds one model."""
    from transformers import AutoModelForImageTextToText

    model: Any = AutoModelForImageTextToText.from_pretrained(base_path, dtype=torch.float32).eval()
    inputs = probe(model.config)
    before = _log_probabilities(model, inputs)
    add_into(model, weights)
    after = _log_probabilities(model, inputs)
    kl = (before.exp() * (before - after)).sum(-1).mean()
    return Behaviour(
        is_same=torch.equal(before, after),
        kl=float(kl.clamp(min=0.0)),
        agreement=float((before.argmax(-1) == after.argmax(-1)).float().mean()),
    )


def probe(config: Any, *, seed: int = 0, with_image: bool = True, tokens: Sequence[int] = ()) -> dict[str, Tensor]:
    """What a model of ``config`` (Qwen2-VL's or Qwen2.5-VL's) is called with: one sequence of random text around an
    image of noise, or of text alone, equal for equal arguments. ``tokens`` are put into the text, as many as fit.

    ``input_ids`` are (1, T); ``pixel_values`` (patches, width of a flattened patch) in fp32.
    """
    generator, vision = torch.Generator().manual_seed(seed), config.vision_config
    special = [config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id]
    text = torch.randint(0, min(special), (NUM_TEXT,), generator=generator)
    wanted = torch.tensor([token for token in tokens if token not in special][:NUM_TEXT], dtype=torch.int64)
    text[: len(wanted)] = wanted
    if not with_image:
        return {"input_ids": text[None]}
    frames, rows, columns = GRID
    patches = frames * rows * columns
    image = [config.image_token_id] * (patches // vision.spatial_merge_size**2)
    middle = torch.tensor([config.vision_start_token_id, *image, config.vision_end_token_id])
    ids = torch.cat([text[: NUM_TEXT // 2], middle, text[NUM_TEXT // 2 :]])[None]
    width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    return {
        "input_ids": ids,
        "pixel_values": torch.randn(patches, width, generator=generator),
        "image_grid_thw": torch.tensor([GRID]),
        "mm_token_type_ids": (ids == config.image_token_id).int(),
    }


@torch.inference_mode()
def _log_probabilities(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    scores: Tensor = model(**inputs).logits[0].float().log_softmax(-1)
    return scores
