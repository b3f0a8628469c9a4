"""What models answer to probes: generated text, and text around an image of noise, the same on every machine.

Shape legend: T positions of a probe, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lora_runtime.behaviour import NUM_TEXT, probe

NUM_EACH = 3
"""Probes of text, and of text around an image: some 200 positions together."""
NUM_GENERATED = 8

Probe = dict[str, Tensor]
Answers = Sequence[Tensor]
"""Logits (T, V) in fp32 of each probe."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Difference:
    """How far other answers are from given ones, over all positions of all probes.

    ``kl``: mean KL(given ‖ other) in nats. ``agreement``: the share of positions with the same likeliest token.
    ``max_abs_logit``: max |other - given|; ``spread``: the standard deviation of the given logits, their own scale.
    """

    kl: float
    agreement: float
    max_abs_logit: float
    spread: float
    is_same: bool
    num_positions: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """Greedy decoding after one probe. ``tokens``: what came before the end, at most NUM_GENERATED; ``num_ordinary`` of
    them are neither padding nor stand for images. ``is_expected``: whether there should be such a one."""

    probe: Literal["text", "image"]
    num_prompt_tokens: int
    tokens: tuple[int, ...]
    num_ordinary: int
    is_expected: bool


def probes_of(config: Any, tokens: Sequence[int] = ()) -> list[Probe]:
    """NUM_EACH probes with an image and as many without, for a model of ``config``. ``tokens``, such as those that an
    adapter trains, are spread over the probes' text; what does not fit is left out."""
    shares = [tokens[start : start + NUM_TEXT] for start in range(0, len(tokens), NUM_TEXT)] or [()]
    return [
        probe(config, seed=seed, with_image=seed % 2 == 0, tokens=shares[seed % len(shares)])
        for seed in range(2 * NUM_EACH)
    ]


@torch.inference_mode()
def answers(model: Any, probes: Iterable[Probe]) -> list[Tensor]:
    """Logits (T, V) of each probe, in fp32, each computed as if it came first."""
    found = []
    for inputs in probes:
        _forget(model)
        found.append(model(**inputs, use_cache=False).logits[0].float())
    return found


def are_finite(given: Answers) -> bool:
    """Whether no logit is NaN or infinite."""
    return all(bool(torch.isfinite(logits).all()) for logits in given)


def difference(given: Answers, other: Answers) -> Difference:
    """Of finite logits. The softmax is taken in fp64, where its own rounding is far below any limit set on it."""
    kl = same = farthest = spread = 0.0
    num_positions = 0
    for one_TV, two_TV in zip(given, other, strict=True):
        one, two = one_TV.double().log_softmax(-1), two_TV.double().log_softmax(-1)
        kl += float((one.exp() * (one - two)).sum())
        same += int((one_TV.argmax(-1) == two_TV.argmax(-1)).sum())
        farthest = max(farthest, float((one_TV - two_TV).abs().max()))
        spread += float(one_TV.std()) * len(one_TV)
        num_positions += len(one_TV)
    return Difference(
        kl=max(0.0, kl / num_positions),
        agreement=same / num_positions,
        max_abs_logit=farthest,
        spread=spread / num_positions,
        is_same=all(torch.equal(one_TV, two_TV) for one_TV, two_TV in zip(given, other, strict=True)),
        num_positions=num_positions,
    )


def prompts(model: Any, probes: Sequence[Probe], expected: Answers) -> list[tuple[Probe, bool]]:
    """A probe of text and one with an image to generate from, and whether the ``expected`` answers go on from it with
    an ordinary token: the first of each that they do so from, or else the first."""
    special = _ends(model) | _special(model)
    found = [
        (inputs, int(logits_TV[-1].argmax()) not in special) for inputs, logits_TV in zip(probes, expected, strict=True)
    ]
    kinds = ([one for one in found if ("pixel_values" in one[0]) is with_image] for with_image in (False, True))
    return [next((one for one in kind if one[1]), kind[0]) for kind in kinds]


@torch.inference_mode()
def generated(model: Any, inputs: Probe, is_expected: bool) -> Generation:
    """What transformers' own greedy ``generate`` makes of one probe, under the model's own generation config."""
    _forget(model)
    ids = inputs["input_ids"]
    output: Tensor = model.generate(
        **inputs, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NUM_GENERATED
    )
    tokens: list[int] = output[0, ids.shape[1] :].tolist()
    ends, special = _ends(model), _special(model)
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return Generation(
        probe="image" if "pixel_values" in inputs else "text",
        num_prompt_tokens=ids.shape[1],
        tokens=tuple(tokens[:stop]),
        num_ordinary=sum(token not in special for token in tokens[:stop]),
        is_expected=is_expected,
    )


def _ends(model: Any) -> set[int]:
    found = model.generation_config.eos_token_id
    return set(found) if isinstance(found, list) else {found} - {None}


def _special(model: Any) -> set[int]:
    config = model.config
    images = {config.image_token_id, config.video_token_id, config.vision_start_token_id, config.vision_end_token_id}
    return images | ({model.generation_config.pad_token_id} - {None})


def _forget(model: Any) -> None:
    """Qwen2-VL keeps the last prompt's positions in the model."""
    for module in model.modules():
        if hasattr(module, "rope_deltas"):
            module.rope_deltas = None
