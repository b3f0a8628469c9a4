"""Requests in vLLM's words, and its outputs in ours."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
from transformers import BatchFeature

from lora_runtime.engine.images import ImageProcessor
from lora_runtime.engine.prompts import Prepared
from lora_runtime.engine.protocol import FinishReason, Sampling, TokenEvent, Usage
from lora_runtime.engine.text import TokenText
from lora_runtime.engine.vllm import names


def sampling_params(sampling: Sampling, max_tokens: int) -> Any:
    """vLLM's ``SamplingParams``: each output carries what is new."""
    return names.SamplingParams(
        n=sampling.n,
        max_tokens=max_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        seed=sampling.seed,
        stop=list(sampling.stop),
        logprobs=sampling.logprobs,
        ignore_eos=sampling.ignore_eos,
        output_kind=names.RequestOutputKind.DELTA,
    )


def engine_input(prepared: Prepared, images: ImageProcessor, visual: tuple[tuple[str, float], ...]) -> Any:
    """A prompt as vLLM's engine takes it, preprocessed.

    ``visual``: what an image's encoding depends on beside the image; vLLM keeps encodings under both.
    """
    salt = prepared.cache_scope or None
    if not prepared.images:
        return names.tokens_input(list(prepared.ids), cache_salt=salt)
    grids = torch.tensor([image.grid for image in prepared.images])
    features = BatchFeature(
        {"pixel_values": torch.cat([image.pixels for image in prepared.images]), "image_grid_thw": grids}
    )
    fields = {
        "pixel_values": names.MultiModalFieldConfig.flat_from_sizes("image", grids.prod(-1)),
        "image_grid_thw": names.MultiModalFieldConfig.batched("image", keep_on_cpu=True),
    }
    identity = hashlib.sha256(repr(visual).encode()).hexdigest()
    return names.mm_input(
        list(prepared.ids),
        names.MultiModalKwargsItems.from_hf_inputs(features, fields),
        {"image": [f"{identity}:{image.digest}" for image in prepared.images]},
        {"image": list(_placeholders(prepared, images))},
        cache_salt=salt,
    )


def _placeholders(prepared: Prepared, images: ImageProcessor) -> Iterator[Any]:
    """Where each image's tokens stand. Neighbours without text between them are told apart by their sizes."""
    lengths = [images.num_tokens(image.grid) for image in prepared.images]
    position, number = 0, 0
    image_token = prepared.image_token
    for token, same in groupby(prepared.ids):
        count = sum(1 for _ in same)
        if token == image_token:
            start = position
            while start < position + count:
                yield names.PlaceholderRange(offset=start, length=lengths[number])
                start += lengths[number]
                number += 1
        position += count


class Events:
    """One request's outputs as events. ``was_cold``: as ``Usage`` has it."""

    def __init__(
        self, token_text: TokenText, prompt_tokens: int, eos_ids: frozenset[int], *, was_cold: bool = False
    ) -> None:
        self._was_cold = was_cold
        self._token_text = token_text
        self._prompt_tokens = prompt_tokens
        self._eos_ids = eos_ids
        self._generated = 0
        self.is_over = False

    def of(self, output: Any) -> Iterator[TokenEvent]:
        """Events of one of vLLM's outputs, the last with the usage."""
        self.is_over = bool(output.finished)
        for place, choice in enumerate(output.outputs):
            ids = list(choice.token_ids)
            self._generated += len(ids)
            is_last = self.is_over and place == len(output.outputs) - 1
            reason: FinishReason | None = None
            if choice.finish_reason is not None:
                reason = "length" if choice.finish_reason == "length" else "stop"
            scores = list(choice.logprobs or [None] * len(ids))
            if reason == "stop" and choice.stop_reason is None and ids and ids[-1] in self._eos_ids:
                ids, scores = ids[:-1], scores[:-1]
            yield TokenEvent(
                choice=choice.index,
                text=choice.text,
                tokens=tuple(self._token(token, found) for token, found in zip(ids, scores, strict=True)),
                finish_reason=reason,
                usage=self._usage() if is_last else None,
            )

    def _usage(self) -> Usage:
        return Usage(prompt_tokens=self._prompt_tokens, completion_tokens=self._generated, was_cold=self._was_cold)

    def _token(self, token: int, found: Any) -> Any:
        if found is None:
            return self._token_text.describe(token, None, ())
        ranked = sorted(found.items(), key=lambda item: item[1].rank)
        # vLLM lists the chosen token beside the best; only as many as asked for are shown.
        best = [(i, entry.logprob) for i, entry in ranked]
        if len(best) > 1 and ranked[-1][0] == token and ranked[-1][1].rank > len(best) - 1:
            best.pop()
        return self._token_text.describe(token, found[token].logprob, best)
