"""Settings of the embedded engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddedConfig:
    """What an :class:`~lora_runtime.engine.embedded.engine.EmbeddedEngine` is made with.

    ``base_path``: a Qwen2-VL checkpoint folder. ``device`` "auto" is CUDA where there is one;
    ``dtype`` "auto" is the checkpoint's on CUDA and float32 on the CPU.
    ``max_batch_size`` requests run at once, each with room for ``max_model_len`` tokens of keys
    and values, allocated at start (None: the base's limit, at most 4096).
    ``max_batched_tokens``: prompt and decode tokens of one step; longer prompts take several steps.
    ``max_slots``: adapters in engine memory; ``host_cache_bytes``: adapters kept in host memory;
    ``image_cache_bytes``: encoded images kept on the device.
    ``max_waiting``: requests queued beyond those that run, before new ones are refused.
    ``max_image_pixels`` bounds an image before it is decoded, ``max_images`` those of a request.
    ``num_threads``: what a step computes with on the CPU (None: ``OMP_NUM_THREADS``, else torch's own choice).
    ``prepack``: on the CPU, keep linear weights a second time in the layout it multiplies fastest with
    (more than twice the speed, twice the memory of those weights).
    """

    base_path: str
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    max_batch_size: int = 16
    max_batched_tokens: int = 2048
    max_slots: int = 8
    max_waiting: int = 256
    host_cache_bytes: int = 4 << 30
    image_cache_bytes: int = 256 << 20
    max_image_pixels: int = 16_000_000
    max_images: int = 16
    num_threads: int | None = None
    prepack: bool = True

    @property
    def known_dtype(self) -> str | None:
        """What the engine will compute in; None where the machine that it runs on decides."""
        if self.dtype != "auto":
            return self.dtype
        return "float32" if self.device == "cpu" else None

    @property
    def max_materialised_bytes(self) -> int:
        """What one adapter of a method other than LoRA may make of the base, in the dtype that is computed in."""
        return self.host_cache_bytes

    def __post_init__(self) -> None:
        for name in ("max_batch_size", "max_batched_tokens", "max_slots", "max_images", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.max_batched_tokens < self.max_batch_size:
            raise ValueError(
                f"max_batched_tokens ({self.max_batched_tokens}) must be at least "
                f"max_batch_size ({self.max_batch_size}): each running request decodes one token a step"
            )
