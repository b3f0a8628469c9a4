"""The tensors of an adapter's folder, from a file that a stranger sent."""

from __future__ import annotations

from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora_runtime.errors import MalformedAdapter
from lora_runtime.folder import TENSORS_NAME, tensors_file
from lora_runtime.names import shown

MAX_HEADER_BYTES = 16 << 20


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of the folder, memory-mapped, in their stored dtype.

    Raises AdapterMissing, MalformedAdapter, or UnsupportedAdapter for an adapter in several shards.
    """
    file = tensors_file(folder)
    try:
        with open(file, "rb") as opened:
            header_bytes = int.from_bytes(opened.read(8), "little")
        if header_bytes > MAX_HEADER_BYTES:
            raise MalformedAdapter(f"{TENSORS_NAME} claims a header of {header_bytes} bytes; the file is damaged.")
        with safe_open(file, framework="pt", device="cpu") as tensors:
            return {name: tensors.get_tensor(name) for name in tensors.keys()}  # noqa: SIM118  # not a mapping
    except MalformedAdapter:
        raise
    except (SafetensorError, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError) as error:
        raise MalformedAdapter(
            f"{TENSORS_NAME} is damaged or no safetensors file ({shown(str(error))}). Copy or save it again."
        ) from error
