"""Images on their way into Qwen2-VL: decoded under limits, resized and cut into patches."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from lora_runtime.errors import InvalidImage

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")


@dataclass(frozen=True, slots=True, eq=False)
class Patches:
    """One image as the vision tower takes it.

    ``pixels`` (P, channels · temporal · patch²) fp32; ``grid`` (t, h, w) in patches, P = t·h·w.
    ``digest`` is the sha256 of the bytes it came from, and of the scope that its encoding is kept in.
    """

    pixels: Tensor
    grid: tuple[int, int, int]
    digest: str


def decode_image(data: bytes, *, max_pixels: int, where: str) -> Image.Image:
    """Decode ``data`` to RGB. The size is checked before any pixel is decoded.

    Raises InvalidImage, naming ``where``, for anything but a sound image of at most ``max_pixels``.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            width, height = image.size
            if width * height > max_pixels:
                raise InvalidImage(
                    f"{where} is {width}x{height} = {width * height} pixels; the limit is {max_pixels}. "
                    "Send a smaller image.",
                    pixels=width * height,
                    limit=max_pixels,
                )
            return image.convert("RGB")
    except InvalidImage:
        raise
    except Image.DecompressionBombError as error:
        raise InvalidImage(f"{where} is far too large; the limit is {max_pixels} pixels.") from error
    except UnidentifiedImageError as error:
        raise InvalidImage(f"{where} is no image that can be read; send one of {', '.join(FORMATS)}.") from error
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError) as error:
        raise InvalidImage(f"{where} is damaged: {error}. Send the whole file.") from error


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
