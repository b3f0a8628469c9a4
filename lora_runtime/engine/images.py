"""Images on their way into Qwen2-VL: decoded (``decoding.py``), resized and cut into patches."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lora_runtime.engine.decoding import decode_image
from lora_runtime.errors import InvalidImage


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as the vision tower takes it.

    ``pixels`` (P, channels · temporal · patch²) fp32; ``grid`` (t, h, w) in patches, P = t·h·w.
    ``digest`` is the sha256 of the bytes it came from, and of the scope that its encoding is kept in.
    """

    pixels: Tensor
    grid: tuple[int, int, int]
    digest: str


class ImageProcessor:
    """Cuts images into patches with the base's own preprocessing settings. Safe to use from any thread."""

    def __init__(self, base_path: str, *, max_pixels: int) -> None:
        # The PIL processor needs no torchvision; AutoProcessor would.
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        self._processor: Any = Qwen2VLImageProcessorPil.from_pretrained(base_path)
        self._max_pixels = max_pixels
        self.merge_size: int = self._processor.merge_size

    def __call__(self, data: bytes, *, where: str) -> Patches:
        """Decode and cut one image. Raises InvalidImage."""
        image = decode_image(data, max_pixels=self._max_pixels, where=where)
        try:
            features = self._processor(images=[image], return_tensors="pt")
        except ValueError as error:
            raise InvalidImage(f"{where} cannot be used: {error}.") from error
        t, h, w = (int(n) for n in features["image_grid_thw"][0])
        pixels = features["pixel_values"].to(torch.float32)
        return Patches(pixels, (t, h, w), hashlib.sha256(data).hexdigest())

    def num_tokens(self, grid: tuple[int, int, int]) -> int:
        """Prompt tokens that an image of this grid takes."""
        t, h, w = grid
        return t * h * w // self.merge_size**2
