"""What a vLLM request says about its target: the text that travels as its LoRA path.

vLLM gives each request at most one "LoRA", with an id, a name and a path. Here the id stands for a target as it
lies in slots now, the name identifies its content (vLLM keys its prefix cache on it), and the path spells
the slots, so that every worker can route rows without having been told anything before.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from lora_runtime.engine.routing import Signature

SCHEME = "loom:"


@dataclass(frozen=True, slots=True, kw_only=True)
class Binding:
    """``signature``: (slot, weight) of a row. ``head``: the classification head that takes the vocabulary's place."""

    signature: Signature
    head: str | None = None

    def to_path(self) -> str:
        return SCHEME + json.dumps({"slots": self.signature, "head": self.head}, separators=(",", ":"))

    @classmethod
    def from_path(cls, path: str) -> Binding:
        """Raises ValueError for a path that :meth:`to_path` did not make."""
        if not path.startswith(SCHEME):
            raise ValueError(f"'{path}' names no target; adapters reach this engine through Loom only.")
        found = json.loads(path.removeprefix(SCHEME))
        return cls(signature=tuple((int(slot), float(weight)) for slot, weight in found["slots"]), head=found["head"])
