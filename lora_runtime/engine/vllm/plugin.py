"""What vLLM's plugin entry point calls in each of its processes, before a worker or a model is made."""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Let workers whose configuration is Loom's use Loom's manager; any other vLLM in the environment is untouched."""
    from lora_runtime.engine.vllm.names import check_version, lora_model_runner_mixin

    stock = lora_model_runner_mixin.LRUCacheWorkerLoRAManager
    if getattr(stock, "is_loom", False):
        return

    def manager(vllm_config: Any, device: Any, embedding_modules: dict[str, str]) -> Any:
        if "loom" not in (vllm_config.additional_config or {}):
            return stock(vllm_config, device, embedding_modules)
        check_version()
        from lora_runtime.engine.vllm.manager import SlotManager

        return SlotManager(vllm_config, device, embedding_modules)

    manager.is_loom = True  # type: ignore[attr-defined]  # marks the replacement, so that it happens once
    lora_model_runner_mixin.LRUCacheWorkerLoRAManager = manager
