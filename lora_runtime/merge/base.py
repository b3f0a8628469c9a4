"""A base's checkpoint folder as a merge sees it: shards, what their tensors are, and what lies beside them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open

from lora_runtime.errors import CheckpointRejected
from lora_runtime.merge.changes import Place
from lora_runtime.merge.shard import DTYPES
from lora_runtime.names import listed, place_of
from lora_runtime.parameters import INDEX_NAME, SINGLE_NAME

CONFIG_NAME = "config.json"
MAX_INDEX_BYTES = 64 << 20
TEMPLATES = "additional_chat_templates"
"""The one folder in a checkpoint that transformers reads files from."""
WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".pkl", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx"}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseShard:
    """One safetensors file. ``places`` and ``dtypes``: by the tensors' names in it."""

    file: str
    num_bytes: int
    header_sha256: str
    places: Mapping[str, Place]
    dtypes: Mapping[str, str]

    def touched(self, changed: frozenset[Place]) -> dict[str, Place]:
        """The tensors that a merge changes."""
        return {name: place for name, place in self.places.items() if place in changed}


class BaseCheckpoint:
    """A folder that transformers can load. Reads headers only."""

    def __init__(self, folder: str | Path) -> None:
        """Raises CheckpointRejected for a folder without a sound safetensors checkpoint, or with a quantised one."""
        self.folder = Path(folder)
        self.config = self._json(CONFIG_NAME)
        if self.config.get("quantization_config"):
            raise CheckpointRejected(
                "The base is quantised: an adapter cannot be added to rounded codes. Merge into the checkpoint that it "
                "was made of.",
                file=CONFIG_NAME,
            )
        self.shards = tuple(self._shard(file) for file in self._files())

    @property
    def num_bytes(self) -> int:
        return sum(shard.num_bytes for shard in self.shards)

    @property
    def places(self) -> dict[str, Place]:
        """What every tensor is, by its name."""
        return {name: place for shard in self.shards for name, place in shard.places.items()}

    @cached_property
    def revision(self) -> str:
        """sha256 over the configuration, and over the name, size and header of every shard. Values are not read."""
        digest = hashlib.sha256((self.folder / CONFIG_NAME).read_bytes())
        for shard in self.shards:
            digest.update(f"{shard.file} {shard.num_bytes} {shard.header_sha256}\n".encode())
        return digest.hexdigest()

    @cached_property
    def beside(self) -> tuple[str, ...]:
        """Files that belong to the checkpoint and hold no weights: configurations, tokenizer, templates, the index."""
        found = [*self.folder.iterdir(), *self.folder.glob(f"{TEMPLATES}/*")]
        return tuple(
            sorted(
                str(file.relative_to(self.folder))
                for file in found
                if file.is_file()
                and not file.name.startswith(".")
                and file.suffix not in WEIGHT_SUFFIXES
                and file.name != "manifest.json"
            )
        )

    def unknown(self, leaves: Mapping[str, object]) -> list[str]:
        """Tensors of no leaf that the configuration's model has."""
        return sorted(name for name, (leaf, _) in self.places.items() if leaf not in leaves)

    def unsummable(self, changed: frozenset[Place]) -> list[str]:
        """Tensors that are to change, and are stored in a dtype that nothing can be added to."""
        return sorted(
            f"{name} ({shard.dtypes[name]})"
            for shard in self.shards
            for name in shard.touched(changed)
            if shard.dtypes[name] not in DTYPES
        )

    def _files(self) -> list[str]:
        if (self.folder / INDEX_NAME).is_file():
            named = sorted(set(self._json(INDEX_NAME).get("weight_map", {}).values()))
        else:
            named = [SINGLE_NAME]
        if odd := [file for file in named if not isinstance(file, str) or Path(file).name != file]:
            raise CheckpointRejected(f"The base's index names {odd[0]!r}, which is no file beside it.", file=INDEX_NAME)
        if missing := [file for file in named if not (self.folder / file).is_file()]:
            raise CheckpointRejected(
                f"The base's folder lacks {listed(missing)}. Copy the checkpoint again, as safetensors.", files=missing
            )
        return named

    def _shard(self, file: str) -> BaseShard:
        path = self.folder / file
        try:
            with safe_open(path, framework="pt") as opened:
                names = list(opened.keys())
                dtypes = {name: str(opened.get_slice(name).get_dtype()) for name in names}
            with open(path, "rb") as raw:
                prefix = raw.read(8)
                header = prefix + raw.read(int.from_bytes(prefix, "little"))
        except (SafetensorError, OSError) as error:
            said = f"'{file}' is damaged or no safetensors file. Copy it again."
            raise CheckpointRejected(said, file=file) from error
        return BaseShard(
            file=file,
            num_bytes=path.stat().st_size,
            header_sha256=hashlib.sha256(header).hexdigest(),
            places={name: place_of(name) for name in names},
            dtypes=dtypes,
        )

    def _json(self, file: str) -> dict[str, dict[str, str]]:
        try:
            with open(self.folder / file, "rb") as opened:
                found = json.loads(opened.read(MAX_INDEX_BYTES))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointRejected(f"The base's {file} cannot be read. Check the path.", file=file) from error
        if not isinstance(found, dict):
            raise CheckpointRejected(f"The base's {file} holds no JSON object.", file=file)
        return found
