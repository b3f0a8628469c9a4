"""Where the built zoo lies. Imports nothing heavy."""

from __future__ import annotations

from pathlib import Path

ZOO = Path(__file__).parent / "data"
BASE = ZOO / "base"
BASE_NAME = "loom-zoo/base"
"""What the adapters' configs call their base."""

ADAPTER_NAMES = ("shape", "size", "fill", "letter", "french", "warmth")
ADAPTERS = {name: ZOO / "adapters" / name for name in ADAPTER_NAMES}
COMBINATIONS: dict[str, dict[str, float]] = {"shape:1+french:1": {"shape": 1.0, "french": 1.0}}
"""Sums that keep every skill in them, by the name a request gives. ``french`` was trained to go with ``shape``."""
