"""The files of a PEFT folder, read as what a stranger sent: bounded, typed, never executed.

Links are followed (model caches are made of them), but only to regular files: a pipe or a device
is not read. Imports no torch: gateways name these files too.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lora_runtime.errors import AdapterMissing, AdapterRejected, MalformedAdapter, UnsupportedAdapter
from lora_runtime.names import shown

CONFIG_NAME = "adapter_config.json"
TENSORS_NAME = "adapter_model.safetensors"
PICKLE_NAME = "adapter_model.bin"
INDEX_NAME = f"{TENSORS_NAME}.index.json"
MODEL_CONFIG_NAME = "config.json"
FILES = (CONFIG_NAME, TENSORS_NAME, MODEL_CONFIG_NAME)
"""All that an adapter is read from; the last one may be absent."""
MAX_JSON_BYTES = 4 << 20

_NAME_SETS = ("target_modules", "exclude_modules", "modules_to_save")
"""Config lists whose order means nothing; PEFT writes them in a new order each time."""


def fingerprint(path: str | Path) -> str:
    """sha256 of an adapter's content, in hex: its config in canonical form, its labels and its tensor file.

    Equal content has one fingerprint however its JSON is laid out. Raises AdapterMissing or MalformedAdapter.
    """
    folder = Path(path)
    config = read_json(config_file(folder))
    for name in _NAME_SETS:
        if isinstance(config.get(name), list):
            config[name] = sorted(config[name], key=str)
    # Only the outer keys are sorted: the order of rank_pattern and alpha_pattern decides which pattern wins.
    digest = hashlib.sha256(json.dumps([sorted(config.items()), read_labels(folder)]).encode())
    file = tensors_file(folder)
    try:
        with open(file, "rb") as opened:
            digest.update(hashlib.file_digest(opened, "sha256").digest())
    except OSError as error:
        raise AdapterMissing(f"{file.name} cannot be read: {error.strerror}.") from error
    return digest.hexdigest()


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size. Raises AdapterMissing or MalformedAdapter."""
    _check_there(file)
    try:
        with open(file, "rb") as opened:
            data = opened.read(MAX_JSON_BYTES + 1)
        if len(data) > MAX_JSON_BYTES:
            raise MalformedAdapter(f"{file.name} is larger than {MAX_JSON_BYTES} bytes; it is no configuration.")
        raw = json.loads(data, object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
    except OSError as error:
        raise AdapterMissing(f"{file.name} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        reason = str(error) if isinstance(error, ValueError) else "nested too deep"
        raise MalformedAdapter(f"{file.name} is not valid JSON ({shown(reason)}); save the adapter again.") from error
    if not isinstance(raw, dict):
        raise MalformedAdapter(f"{file.name} holds no JSON object; save the adapter again.")
    return raw


def read_labels(folder: Path) -> dict[str, str]:
    """``id2label`` of the model config that trainers save beside a classifier, if there is one."""
    if not _is_file(folder / MODEL_CONFIG_NAME):
        return {}
    labels = read_json(folder / MODEL_CONFIG_NAME).get("id2label")
    return {str(key): str(value) for key, value in labels.items()} if isinstance(labels, dict) else {}


def config_file(folder: Path) -> Path:
    """The file of the adapter's configuration. Raises AdapterMissing."""
    _check_there(folder / CONFIG_NAME)
    return folder / CONFIG_NAME


def tensors_file(folder: Path) -> Path:
    """The file of the adapter's tensors. Raises AdapterMissing, MalformedAdapter or UnsupportedAdapter."""
    if not _is_file(folder / TENSORS_NAME):
        raise _no_tensors(folder)
    return folder / TENSORS_NAME


def _no_tensors(folder: Path) -> AdapterMissing | AdapterRejected:
    if _is_file(folder / PICKLE_NAME):
        return MalformedAdapter(
            f"The adapter comes as {PICKLE_NAME}, a pickle, which is never read. Convert it with safetensors "
            "(PeftModel.save_pretrained writes that by default)."
        )
    if _is_file(folder / INDEX_NAME):
        return UnsupportedAdapter(
            f"The adapter comes in several shards ({INDEX_NAME}), which PEFT does not read either. "
            f"Join them into one {TENSORS_NAME}."
        )
    return AdapterMissing(f"There is no {TENSORS_NAME} in the adapter's folder; check its path.")


def _check_there(file: Path) -> None:
    if not _is_file(file):
        raise AdapterMissing(f"There is no {file.name} in the adapter's folder; check its path.")


def _is_file(path: Path) -> bool:
    """Whether ``path`` is, or links to, a regular file. A loop of links or an impossible name is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _without_duplicates(pairs: list[tuple[str, Any]]) -> Mapping[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is no JSON number")
