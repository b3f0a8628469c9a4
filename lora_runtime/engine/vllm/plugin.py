"""What vLLM's plugin entry point calls in each of its processes, before a worker or a model is made."""

from __future__ import annotations

import logging
from typing import Any

log = logging.getLogger(__name__)


def register() -> None:
    """Let workers whose configuration is Loom's use Loom's manager; any other vLLM in the environment is untouched."""
    try:
        from lora_runtime.engine.vllm.names import check_version, lora_model_runner_mixin
    except ImportError as error:
        # Another vLLM, used for something else: it must start as if Loom were not installed. Loom's own
        # engine imports the same names first, and says so.
        log.warning("Loom does not know this vLLM's internals: %s", error)
        return

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
