"""A base checkpoint's own tensors by canonical name, read one at a time."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from lora_runtime.errors import NotFound
from lora_runtime.names import canonical, place_of

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class BaseParameters:
    """``parameters(leaf, name)`` gives W₀ of one parameter. Files are memory-mapped, nothing is kept."""

    def __init__(self, base_path: str | Path) -> None:
        """Reads the checkpoint's index only. Raises NotFound where there is no safetensors checkpoint."""
        folder = Path(base_path)
        if (folder / INDEX_NAME).is_file():
            listed = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
        elif (folder / SINGLE_NAME).is_file():
            with safe_open(folder / SINGLE_NAME, framework="pt") as opened:
                listed = dict.fromkeys(opened.keys(), SINGLE_NAME)
        else:
            raise NotFound("The base's folder holds no safetensors checkpoint; check the path.")
        self._folder = folder
        self._places = {place_of(key): (folder / file, key) for key, file in listed.items()}

    def __call__(self, leaf: str, parameter: str) -> Tensor:
        """Raises NotFound for a tensor that the checkpoint does not hold. A tied head is its embedding."""
        place = self._places.get((leaf, parameter))
        if place is None and leaf == "lm_head":
            place = self._places.get((canonical("embed_tokens"), parameter))
        if place is None:
            raise NotFound(f"The base's checkpoint holds no '{leaf}.{parameter}'.")
        file, key = place
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(key)
        return tensor
