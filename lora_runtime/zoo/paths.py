"""Where the built zoo lies. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

ZOO = Path(__file__).parent / "data"
BASE = ZOO / "base"
BASE_NAME = "loom-zoo/base"
"""What the adapters' configs call their base."""

ADAPTER_NAMES = ("shape", "size", "fill", "letter", "french", "warmth")
ADAPTERS = {name: ZOO / "adapters" / name for name in ADAPTER_NAMES}
COMBINATIONS: dict[str, dict[str, float]] = {}
"""Weights under which two skills are both kept, by label. None is shipped yet: each adapter was trained alone and
speaks up on the others' questions too, so their sums are exact but answer neither skill."""
