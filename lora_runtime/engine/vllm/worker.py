"""Methods that vLLM mixes into its workers, for ``collective_rpc``. Arguments are plain values."""

from __future__ import annotations

from typing import Any

from lora_runtime.engine.vllm.manager import SlotManager
from lora_runtime.errors import LoomError


class SlotWorker:
    """Mixed into vLLM's worker class; every name begins with ``loom_`` to clash with none of its own."""

    model_runner: Any

    def loom_check(self) -> str | None:
        """Prove that this vLLM does what the slots need; returns None, or what deviates."""
        try:
            self._loom_manager().check()
        except LoomError as error:
            return error.message
        return None

    def loom_fill(self, slot: int, path: str, version: str) -> str | None:
        """Fill a slot; returns None, or what was wrong. Runs between steps, and stalls them while it lasts."""
        try:
            self._loom_manager().fill(slot, path, version)
        except LoomError as error:
            return error.message
        return None

    def loom_clear(self, slot: int) -> None:
        self._loom_manager().clear(slot)

    def loom_num_encoded(self) -> int:
        """Images that went through the tower so far."""
        return self._loom_manager().num_encoded

    def _loom_manager(self) -> SlotManager:
        manager: SlotManager = self.model_runner.lora_manager
        return manager
