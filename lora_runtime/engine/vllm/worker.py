"""Methods that vLLM mixes into its workers, for ``collective_rpc``. Arguments are plain values."""

from __future__ import annotations

import logging
from typing import Any

from lora_runtime.engine.vllm.manager import Progress, SlotManager
from lora_runtime.errors import LoomError

log = logging.getLogger(__name__)


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

    def loom_fill(self, slot: int, path: str, version: str) -> tuple[Progress, str | None]:
        """Fill a slot a little further, between steps; returns how far it is, or "done" and what was wrong."""
        try:
            return self._loom_manager().fill(slot, path, version), None
        except LoomError as error:
            return "done", error.message
        except Exception as error:  # one adapter's tensors must not take the engine down
            log.exception("an adapter could not be put into its slot")
            return "done", f"The adapter could not be loaded: {type(error).__name__}."

    def loom_fill_probe(self, slot: int) -> None:
        """Put the adapter of :mod:`.probe` into a slot."""
        self._loom_manager().fill_probe(slot)

    def loom_clear(self, slot: int) -> None:
        self._loom_manager().clear(slot)

    def loom_num_encoded(self) -> int:
        """Images that went through the tower so far."""
        return self._loom_manager().num_encoded

    def _loom_manager(self) -> SlotManager:
        manager: SlotManager = self.model_runner.lora_manager
        return manager
