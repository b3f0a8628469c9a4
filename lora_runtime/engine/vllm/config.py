"""Settings of the vLLM engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

OWN = frozenset(
    {
        *("model", "dtype", "max_model_len", "max_num_seqs", "max_num_batched_tokens", "gpu_memory_utilization"),
        *("enable_prefix_caching", "tensor_parallel_size", "seed", "enable_lora", "max_loras", "max_lora_rank"),
        *("async_scheduling", "enforce_eager", "max_logprobs", "limit_mm_per_prompt", "mm_processor_cache_gb"),
        *("mm_device_do_normalize", "worker_extension_cls", "additional_config", "disable_log_stats"),
    }
)
"""Arguments of vLLM's engine that are not to be had through ``extra``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class VllmConfig:
    """What a :class:`~lora_runtime.engine.vllm.engine.VllmEngine` is made with.

    ``base_path``: a Qwen2-VL checkpoint folder. ``dtype`` "auto" is the checkpoint's.
    ``max_batch_size`` requests run at once (vLLM's ``max_num_seqs``), ``max_batched_tokens`` tokens a step.
    ``max_slots``: adapters resident at once. ``saved_bytes``: memory for the saved modules of all of them.
    ``kv_cache_bytes``: keys and values on a CPU; on a GPU vLLM takes ``gpu_memory_utilization`` of the card.
    ``max_waiting``: requests queued beyond those that run. ``max_image_pixels`` bounds an image before it is
    decoded, ``max_images`` those of a request. ``prefix_caching``: keys and values of equal beginnings of
    equal targets are kept. ``tensor_parallel_size``: workers, each with a device and a part of every leaf, whose
    ``saved_bytes`` are for its own part. ``num_threads``: what one worker computes with on a CPU (None:
    ``OMP_NUM_THREADS``, else torch's own choice, at most what the process may use). ``compile``: on a CPU
    with one worker, compile the language model at start, which takes a C++ compiler and from seconds to minutes
    and makes a small model's steps a quarter faster. ``extra``: further arguments of vLLM's engine, by its own names.
    """

    base_path: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    max_model_len: int | None = None
    max_batch_size: int = 16
    max_batched_tokens: int = 2048
    max_slots: int = 8
    max_waiting: int = 256
    saved_bytes: int = 4 << 30
    kv_cache_bytes: int = 1 << 30
    gpu_memory_utilization: float = 0.85
    max_image_pixels: int = 16_000_000
    max_images: int = 16
    prefix_caching: bool = True
    tensor_parallel_size: int = 1
    seed: int = 0
    num_threads: int | None = None
    compile: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def known_dtype(self) -> str | None:
        """What the engine will compute in; None where vLLM decides."""
        return None if self.dtype == "auto" else self.dtype

    @property
    def max_materialised_bytes(self) -> int:
        """What one adapter of a method other than LoRA may make of the base, in the dtype that is computed in."""
        return self.saved_bytes

    def __post_init__(self) -> None:
        if taken := sorted(OWN & set(self.extra)):
            raise ValueError(f"extra must not set {', '.join(taken)}; the engine sets it, some by settings of its own.")
        for name in ("max_batch_size", "max_batched_tokens", "max_slots", "max_images", "max_image_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        if self.extra.get("pipeline_parallel_size", 1) != 1:
            raise ValueError(
                "The vLLM engine does not split a model into stages; use tensor_parallel_size, or replicas."
            )
        if self.compile and self.tensor_parallel_size > 1:
            raise ValueError("compile goes with one worker; leave it out, or set tensor_parallel_size to 1.")
        if self.tensor_parallel_size < 1:
            raise ValueError(f"tensor_parallel_size must be at least 1, not {self.tensor_parallel_size}")
