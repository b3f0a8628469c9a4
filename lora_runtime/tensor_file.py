"""The tensors of an adapter's folder, from a file that a stranger sent."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_runtime.errors import MalformedAdapter
from lora_runtime.folder import TENSORS_NAME, tensors_file
from lora_runtime.names import shown

MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 1 << 15
"""Of one file. Names are matched one by one; the largest adapters of known bases have a few thousand."""
MAX_DIMENSIONS = 8


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, memory-mapped, in their stored dtype.

    Overlaps, gaps and offsets outside the file are refused by safetensors; here, what it lets pass: a header, a number
    of tensors or of dimensions out of proportion, and names that occur twice.

    Raises AdapterMissing, MalformedAdapter, or UnsupportedAdapter for an adapter in several shards.
    """
    file = tensors_file(folder)
    try:
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
            if header_bytes > MAX_HEADER_BYTES:
                raise MalformedAdapter(f"{TENSORS_NAME} claims a header of {header_bytes} bytes; the file is damaged.")
            _check_header(opened.read(header_bytes))
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a mapping
    except MalformedAdapter:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise MalformedAdapter(
            f"{TENSORS_NAME} is damaged or no safetensors file ({shown(str(error))}). Copy or save it again."
        ) from error


def _check_header(header: bytes) -> None:
    """Raises MalformedAdapter, or ValueError or RecursionError for what is no JSON. Types are left to safetensors."""
    said = json.loads(header, object_pairs_hook=_without_duplicates)
    if not isinstance(said, dict):
        raise MalformedAdapter(f"The header of {TENSORS_NAME} is no JSON object; the file is damaged.")
    if len(said) > MAX_TENSORS:
        raise MalformedAdapter(f"{TENSORS_NAME} has {len(said)} tensors; at most {MAX_TENSORS} are read.")
    for name, tensor in said.items():
        shape = tensor.get("shape") if isinstance(tensor, dict) else None
        if name != "__metadata__" and isinstance(shape, list) and len(shape) > MAX_DIMENSIONS:
            raise MalformedAdapter(
                f"'{shown(name)}' in {TENSORS_NAME} has {len(shape)} dimensions; at most {MAX_DIMENSIONS} are read."
            )


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise MalformedAdapter(
            f"The header of {TENSORS_NAME} has a name twice, of which readers may take either. Save the adapter again."
        )
    return found
