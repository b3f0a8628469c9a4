"""Adapters without weights, for tests on the engine without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

EMPTY_TENSORS = b"\x02\0\0\0\0\0\0\0{}"
"""A safetensors file of no tensors."""


def write_fake_adapter(folder: Path, **config: Any) -> Path:
    """An adapter's folder whose content is ``config``; written over where it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config))
    (folder / "adapter_model.safetensors").write_bytes(EMPTY_TENSORS)
    return folder
