"""Methods that vLLM mixes into its workers, for ``collective_rpc``. Arguments are plain values."""

from __future__ import annotations

import logging
from typing import Any

from lora_runtime.engine.vllm.manager import Progress, SlotManager
from lora_runtime.errors import AdapterRejected, LoomError, packed

log = logging.getLogger(__name__)

NUM_ROWS_COMPILED = 4
"""Any number but 0 and 1, which compilers take for constants."""


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

    def loom_compile(self) -> str | None:
        """Compile the language model where that was asked for; returns None, or why it could not be."""
        try:
            self._loom_manager().compile(lambda: self.model_runner._dummy_run(NUM_ROWS_COMPILED))
        except Exception as error:  # whatever a compiler or its absence raises, the engine says and does not start
            log.exception("the language model could not be compiled")
            return (
                f"The language model could not be compiled ({type(error).__name__}; the log has more). It takes a C++ "
                "compiler; without one set compile to false."
            )
        return None

    def loom_fill(self, slot: int, path: str, version: str) -> tuple[Progress, tuple[str, str, dict[str, Any]] | None]:
        """Fill a slot a little further, between steps; returns how far it is, or "done" and the error, packed."""
        try:
            return self._loom_manager().fill(slot, path, version), None
        except LoomError as error:
            return "done", packed(error)
        except Exception as error:  # one adapter's tensors must not take the engine down
            log.exception("an adapter could not be put into its slot")
            return "done", packed(AdapterRejected(f"The adapter could not be loaded: {type(error).__name__}."))

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
